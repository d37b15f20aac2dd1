"""Hugging Face's CLIP and open_clip's are the same network under other names; this module is the dictionary.

open_clip keeps the three attention projections in one matrix [3d, d]; Hugging Face has q_proj, k_proj and v_proj. The
two final projections are transposed. Everything else only changes its name.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import open_clip
import torch
from open_clip.tokenizer import SimpleTokenizer
from open_clip.transform import PreprocessCfg
from open_clip.transformer import QuickGELU, VisionTransformer
from PIL import Image
from torch import Tensor, nn

from ..storage.files import save_json, save_tensors
from .clip import CONFIG_NAME, WEIGHTS_NAME, ClipModel

if TYPE_CHECKING:  # transformers takes seconds to import
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

VISION, TEXT = "vision_model", "text_model"
LEGACY_EOS = 2  # written by early converters; transformers then pools at the largest token id
MODULES = {
    "visual.conv1": f"{VISION}.embeddings.patch_embedding",
    "visual.ln_pre": f"{VISION}.pre_layrnorm",
    "visual.ln_post": f"{VISION}.post_layernorm",
    "token_embedding": f"{TEXT}.embeddings.token_embedding",
    "ln_final": f"{TEXT}.final_layer_norm",
}
PARAMETERS = {
    "visual.class_embedding": f"{VISION}.embeddings.class_embedding",
    "visual.positional_embedding": f"{VISION}.embeddings.position_embedding.weight",
    "positional_embedding": f"{TEXT}.embeddings.position_embedding.weight",
    "logit_scale": "logit_scale",
}
TRANSPOSED = {"visual.proj": "visual_projection.weight", "text_projection": "text_projection.weight"}
BLOCK = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")  # the order of in_proj's rows
_RESAMPLING = {"bicubic": "BICUBIC", "bilinear": "BILINEAR", "nearest": "NEAREST"}
ACTIVATIONS = ("quick_gelu", "gelu", "gelu_pytorch_tanh")


class Unsupported(ValueError):
    """The model cannot be written in the asked-for form; the message says why, and what can be written."""


def layer_names(name: str) -> tuple[str, ...]:
    """open_clip's name of a layer ("visual.transformer.resblocks.0.mlp.c_fc") -> Hugging Face's, three for an in_proj.

    Raises KeyError for a layer that Hugging Face's CLIP does not have.
    """
    if name in MODULES:
        return (MODULES[name],)
    tower, found, rest = name.partition("transformer.resblocks.")
    number, _, layer = rest.partition(".")
    if not found or tower not in ("visual.", ""):
        raise KeyError(name)
    prefix = f"{VISION if tower else TEXT}.encoder.layers.{number}."
    if layer == "attn.in_proj":
        return tuple(prefix + part for part in QKV)
    return (prefix + BLOCK[layer],)


def to_hf_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """open_clip's weights -> CLIPModel's, sharing memory where they can.

    Raises KeyError, naming it, for a weight that CLIPModel does not have.
    """
    renamed: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if name in PARAMETERS:
            renamed[PARAMETERS[name]] = tensor.reshape(()) if name == "logit_scale" else tensor
        elif name in TRANSPOSED:
            renamed[TRANSPOSED[name]] = tensor.T
        else:
            layer, _, kind = name.replace(".in_proj_", ".in_proj.").rpartition(".")
            try:
                targets = layer_names(layer)
            except KeyError:
                raise KeyError(name) from None
            for target, part in zip(targets, tensor.chunk(len(targets)), strict=True):
                renamed[f"{target}.{kind}"] = part
    return renamed


def from_hf_state(state: Mapping[str, Tensor], names: Iterable[str]) -> dict[str, Tensor]:
    """CLIPModel's weights -> open_clip's, for the open_clip parameter `names`. Inverse of to_hf_state."""
    restored = {}
    for name in names:
        if name in PARAMETERS:
            restored[name] = state[PARAMETERS[name]]
        elif name in TRANSPOSED:
            restored[name] = state[TRANSPOSED[name]].T
        else:
            layer, _, kind = name.replace(".in_proj_", ".in_proj.").rpartition(".")
            restored[name] = torch.cat([state[f"{target}.{kind}"] for target in layer_names(layer)])
    return restored


def hf_config(clip: ClipModel) -> CLIPConfig:
    """The CLIPConfig of the same architecture.

    Raises Unsupported where Hugging Face's CLIP lacks something that the model has.
    """
    from transformers import CLIPConfig

    _check_expressible(clip)
    model, visual, tokenizer = clip.model, clip.model.visual, cast(SimpleTokenizer, clip.tokenizer)
    end = model.text_eos_id if model.text_pool_type == "eos" else tokenizer.eot_token_id
    text = {
        "vocab_size": model.vocab_size,
        "max_position_embeddings": model.context_length,
        "bos_token_id": tokenizer.sot_token_id,
        "eos_token_id": end,
        "pad_token_id": end,
        **_tower(model.transformer),
    }
    vision = {"image_size": visual.image_size[0], "patch_size": visual.patch_size[0], **_tower(visual.transformer)}
    width = visual.proj.shape[1]
    for tower in (text, vision):
        tower["projection_dim"] = width
    return CLIPConfig(text_config=text, vision_config=vision, projection_dim=width)


def to_hf(clip: ClipModel) -> CLIPModel:
    """`clip` as a Hugging Face CLIPModel, adapters merged, in evaluation mode, on the CPU in float32."""
    from transformers import CLIPModel

    model = CLIPModel(hf_config(clip)).eval()
    model.load_state_dict(to_hf_state(clip.exported_state_dict()))
    return model


def hf_image_processor(preprocessing: Mapping[str, Any]) -> CLIPImageProcessor:
    """open_clip's preprocessing settings as a CLIPImageProcessor.

    Raises Unsupported for a resize mode that CLIPImageProcessor lacks.
    """
    from transformers import CLIPImageProcessor

    size, mode = preprocessing["size"], preprocessing["resize_mode"]
    height, width = (size, size) if isinstance(size, int) else size
    if mode == "longest" or (mode == "shortest" and height != width):
        raise Unsupported(
            f"CLIPImageProcessor cannot resize images with resize_mode={mode!r}, size={size}; "
            "--format open_clip and onnx keep the model's own preprocessing"
        )
    resized = {"shortest_edge": height} if mode == "shortest" else {"height": height, "width": width}
    return CLIPImageProcessor(
        size=resized,
        crop_size={"height": height, "width": width},
        do_center_crop=mode == "shortest",
        image_mean=list(preprocessing["mean"]),
        image_std=list(preprocessing["std"]),
        resample=Image.Resampling[_RESAMPLING.get(preprocessing["interpolation"], "BICUBIC")],
    )


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Inside, transformers keeps its bars and its reports of unused weights to itself; errors are raised as ever."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def is_hf_folder(folder: Path) -> bool:
    """Whether `folder` holds a Hugging Face model rather than an open_clip one."""
    return (folder / "config.json").is_file() and not (folder / CONFIG_NAME).is_file()


def hf_to_open_clip(source: Path, folder: Path) -> None:
    """Reads the CLIPModel in `source`, writes it to `folder` for open_clip ("local-dir:FOLDER").

    Raises:
        Unsupported: not a CLIPModel, or one that open_clip cannot express.
        OSError: no safetensors weights there (pickled ones are not read).
    """
    from transformers import CLIPModel

    kind = json.loads((source / "config.json").read_text(encoding="utf-8")).get("model_type")
    if kind != "clip":
        hint = ": it is one encoder; convert the CLIPModel that it came from" if "clip_" in str(kind) else ""
        raise Unsupported(f"{source} holds a {kind!r} model, only a CLIPModel ('clip') can be read{hint}")
    with quiet():
        model = CLIPModel.from_pretrained(source, use_safetensors=True, dtype=torch.float32)
    architecture = _open_clip_config(source, model.config)
    with torch.device("meta"):
        names = open_clip.model.CLIP(**architecture).state_dict()
    save_tensors(folder / WEIGHTS_NAME, from_hf_state(model.state_dict(), names), {"format": "pt"})
    save_json(folder / CONFIG_NAME, {"model_cfg": architecture, "preprocess_cfg": _preprocess_config(source, model)})


def _tower(transformer: nn.Module) -> dict[str, Any]:
    """The options that CLIPTextConfig and CLIPVisionConfig have in common."""
    block: Any = transformer.resblocks[0]  # type: ignore[index]
    return {
        "hidden_size": block.mlp.c_fc.in_features,
        "intermediate_size": block.mlp.c_fc.out_features,
        "num_hidden_layers": len(transformer.resblocks),  # type: ignore[arg-type]
        "num_attention_heads": block.attn.heads,
        "hidden_act": _activation(block.mlp.gelu),
        "layer_norm_eps": block.ln_1.eps,
    }


def _activation(module: nn.Module) -> str:
    if isinstance(module, QuickGELU):
        return "quick_gelu"
    if isinstance(module, nn.GELU):
        return "gelu" if module.approximate == "none" else "gelu_pytorch_tanh"
    raise Unsupported(f"Hugging Face's CLIP is not known to have the activation {type(module).__name__}")


def _check_expressible(clip: ClipModel) -> None:
    """Raises Unsupported with every reason why `clip` is no Hugging Face CLIP."""
    model, visual, reasons = clip.model, clip.model.visual, []
    if type(model) is not open_clip.CLIP:
        reasons.append(f"it is a {type(model).__name__}")
    if type(visual) is not VisionTransformer:
        reasons.append(f"its image encoder is a {type(visual).__name__}, not a ViT")
    if not reasons:
        if visual.pool_type != "tok" or visual.final_ln_after_pool or visual.attn_pool is not None:
            reasons.append(f"its image encoder pools by {visual.pool_type!r}, not by the class token")
        if visual.image_size[0] != visual.image_size[1] or visual.patch_size[0] != visual.patch_size[1]:
            reasons.append(f"its images are {visual.image_size}, not square")
        if not clip.trims_text:
            reasons.append(f"its text encoder is not causal, or pools by {model.text_pool_type!r}")
        if not isinstance(clip.tokenizer, SimpleTokenizer):
            reasons.append(f"its tokenizer is a {type(clip.tokenizer).__name__}, not CLIP's")
        if len({*PARAMETERS, *TRANSPOSED} - set(clip.exported_state_dict())):
            reasons.append("it lacks a projection")
        try:
            to_hf_state(clip.exported_state_dict())
        except KeyError as error:
            reasons.append(f"it has {error.args[0]}")
    if reasons:
        raise Unsupported(
            f"{clip.name} cannot be a Hugging Face CLIPModel: {', '.join(reasons)}; "
            "it can be exported with --format open_clip or onnx"
        )


def _open_clip_config(source: Path, config: Any) -> dict[str, Any]:
    """open_clip's model_cfg for a CLIPConfig."""
    text, vision = config.text_config, config.vision_config
    activation = vision.hidden_act
    if activation not in ACTIVATIONS or text.hidden_act != activation:
        raise Unsupported(
            f"{source}: open_clip has one activation for both encoders, one of {', '.join(ACTIVATIONS)}; this model "
            f"has {text.hidden_act!r} and {vision.hidden_act!r}"
        )
    if text.vocab_size != SimpleTokenizer().vocab_size:
        raise Unsupported(f"{source}: its vocabulary of {text.vocab_size} tokens is not CLIP's")
    pooling = {}
    if text.eos_token_id not in (LEGACY_EOS, text.vocab_size - 1):  # the largest id is where open_clip pools anyway
        pooling = {"pool_type": "eos", "eos_id": text.eos_token_id}
    shared = [
        {
            "width": tower.hidden_size,
            "layers": tower.num_hidden_layers,
            "mlp_ratio": tower.intermediate_size / tower.hidden_size,
            "norm_kwargs": {"eps": tower.layer_norm_eps},
            **({"act_kwargs": {"approximate": "tanh"}} if activation == "gelu_pytorch_tanh" else {}),
        }
        for tower in (text, vision)
    ]
    return {
        "embed_dim": config.projection_dim,
        "quick_gelu": activation == "quick_gelu",
        "vision_cfg": {
            **shared[1],
            "image_size": vision.image_size,
            "patch_size": vision.patch_size,
            "head_width": vision.hidden_size // vision.num_attention_heads,
        },
        "text_cfg": {
            **shared[0],
            "context_length": text.max_position_embeddings,
            "vocab_size": text.vocab_size,
            "heads": text.num_attention_heads,
            **pooling,
        },
    }


def _preprocess_config(source: Path, model: Any) -> dict[str, Any]:
    """open_clip's preprocess_cfg from the folder's image processor, or OpenAI's settings where it has none."""
    from transformers import CLIPImageProcessor

    size = model.config.vision_config.image_size
    known = any((source / name).is_file() for name in ("preprocessor_config.json", "processor_config.json"))
    processor = CLIPImageProcessor.from_pretrained(source) if known else hf_image_processor(_openai_settings(size))
    names = {value: name for name, value in _RESAMPLING.items()}
    return {
        **_openai_settings(size),
        "mean": list(processor.image_mean),
        "std": list(processor.image_std),
        "interpolation": names[Image.Resampling(processor.resample).name],
        "resize_mode": "shortest" if processor.do_center_crop else "squash",
    }


def _openai_settings(size: int) -> dict[str, Any]:
    return asdict(PreprocessCfg(size=size))
