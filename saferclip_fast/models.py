"""CLIP models for safety fine-tuning: any open_clip model, LoRA or full, with a frozen twin and an export."""

import contextlib
import copy
import difflib
import hashlib
import json
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.tokenizer import HFTokenizer
from torch import nn

from .attention import Place, packed_names, unpack_attention
from .blocks import run_transformer, trim_blocks
from .data.pack import PackedCaptions, pack
from .data.trim import pad_id
from .files import save_json, save_tensors
from .lora import CAPTIONING, adapters_off, add_lora, lora_layers, merged_state_dict

CONFIG_FOLDER = Path(__file__).parent / "configs" / "models"
WEIGHTS_NAME = "open_clip_model.safetensors"
CONFIG_NAME = "open_clip_config.json"

open_clip.add_model_config(CONFIG_FOLDER)


class ClipModel(nn.Module):
    """An open_clip model with everything that belongs to it: preprocessing, tokenizer, identity, frozen twin."""

    def __init__(
        self, model: nn.Module, name: str, preprocess: Callable, tokenizer: Callable, config: dict[str, Any]
    ) -> None:
        """Use load_clip. `config` is the content of open_clip's config file: model_cfg and preprocess_cfg."""
        super().__init__()
        self.name = name
        self.preprocess = preprocess
        self.tokenizer = tokenizer
        self.config = config
        self.pad_id = pad_id(tokenizer)
        text = _text_tower(model)
        self.trims_text = (
            hasattr(text, "attn_mask")
            and text.attn_mask is not None
            and getattr(text, "cls_emb", None) is None
            and _pooling(model) in ("argmax", "eos")
        )
        unpack_attention(model, text.transformer if self.trims_text else None)
        trim_blocks(model, text.transformer if self.trims_text else None)
        self.model: Any = model.requires_grad_(False).eval()
        # a list hides the twin from parameters(), state_dict() and train()
        self._twin: list[nn.Module] = []
        self.weights_hash = self.hash_weights()

    @property
    def device(self) -> torch.device:
        return self.model.logit_scale.device

    @property
    def preprocessing(self) -> dict[str, Any]:
        """open_clip's image preprocessing settings (size, mean, std, interpolation ...), JSON-able."""
        return self.config["preprocess_cfg"]

    def encode_image(self, images: torch.Tensor) -> torch.Tensor:
        """Images [B, 3, H, W], preprocessed -> embeddings [B, d], not normalized."""
        return self.model.encode_image(images)

    def encode_text(self, text: torch.Tensor | PackedCaptions) -> torch.Tensor:
        """Token ids [N, L], L up to the context length, or packed captions -> embeddings [N, d], not normalized.

        A causal encoder that reads its end-of-text position gives the same embedding for tokens cut after
        the longest caption, and for packed ones, at a fraction of the cost. Others get the padding back.
        Raises ValueError for tokens longer than the context, or packed ones that the encoder cannot read.
        """
        tokens = text.tokens if isinstance(text, PackedCaptions) else text
        length, context = tokens.shape[1], self.model.context_length
        if length > context:
            raise ValueError(f"tokens have length {length}, {self.name} reads at most {context}")
        if self.trims_text:
            return self._encode_causal(text)
        if isinstance(text, PackedCaptions):
            raise ValueError(f"the text encoder of {self.name} is not causal and cannot read packed captions")
        return self.model.encode_text(nn.functional.pad(text, (0, context - length), value=self.pad_id))

    def _encode_causal(self, text: torch.Tensor | PackedCaptions) -> torch.Tensor:
        encoder = _text_tower(self.model)
        if isinstance(text, PackedCaptions):
            tokens, position = text.tokens, encoder.positional_embedding[text.positions]
            mask, place = text.attention_mask(position.dtype), Place(text.ends, text.rows)
        else:
            tokens, position = text, encoder.positional_embedding[: text.shape[1]]
            mask, place = None, Place(self._ends(text))
        dtype = encoder.transformer.get_cast_dtype()
        x = encoder.token_embedding(tokens).to(dtype) + position.to(dtype)
        x = encoder.ln_final(run_transformer(encoder.transformer, x, mask, place))
        if encoder.text_projection is None:
            return x
        if isinstance(encoder.text_projection, nn.Linear):
            return encoder.text_projection(x)
        return x @ encoder.text_projection

    def pack(self, tokens: torch.Tensor, lengths: Sequence[int]) -> torch.Tensor | PackedCaptions:
        """Tokens [N, L], of which row i needs its first lengths[i], packed if the text encoder can read them so."""
        return pack(tokens, lengths, self._ends(tokens), self.model.context_length) if self.trims_text else tokens

    def _ends(self, tokens: torch.Tensor) -> torch.Tensor:
        """Position [N] of the end-of-text token that a causal encoder reads, of tokens [N, L]."""
        end = tokens if _pooling(self.model) == "argmax" else (tokens == _eos_id(self.model)).int()
        return end.argmax(dim=-1)

    def forward(self, images: torch.Tensor, text: torch.Tensor | PackedCaptions) -> tuple[torch.Tensor, torch.Tensor]:
        """Images [M, 3, H, W] and tokens [N, L] or N packed captions -> embeddings [M, d] and [N, d]."""
        return self.encode_image(images), self.encode_text(text)

    def train(self, mode: bool = True) -> "ClipModel":
        """Training mode; under LoRA only the adapters' dropout switches, the frozen base stays as evaluated."""
        adapters = lora_layers(self.model)
        super().train(mode and not adapters)
        for layer in adapters.values():
            layer.lora_dropout.train(mode)
        return self

    def add_lora(
        self, rank: int = 16, alpha: float = 16.0, dropout: float = 0.0, targets: Sequence[str] = ("all",)
    ) -> "ClipModel":
        """Train adapters on both encoders, nothing else (see lora.add_lora). The frozen twin costs no memory."""
        add_lora(self.model, rank, alpha, dropout, targets)
        return self

    def unfreeze(self, keep_frozen: bool = False) -> "ClipModel":
        """Train every weight but the logit scale and bias, which no objective here reads.

        Args:
            keep_frozen: keep a copy of the weights for frozen(); not needed where the frozen embeddings
                come from the cache, as in training.
        """
        if keep_frozen:
            self._twin = [copy.deepcopy(self.model)]
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(not name.startswith((CAPTIONING, "logit_scale", "logit_bias")))
        return self

    @contextlib.contextmanager
    def frozen(self) -> Iterator["ClipModel"]:
        """Inside, this object is the pre-trained model: adapters off, or the kept copy; no gradients.

        Raises RuntimeError where every weight is trained and none was kept.
        """
        trained, training = self.model, self.training or any(m.training for m in self.model.modules())
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            if lora_layers(trained):
                stack.enter_context(adapters_off(trained))
            elif self._twin:
                self.model = self._twin[0].to(self.device)
            elif any(p.requires_grad for p in trained.parameters()):
                raise RuntimeError(
                    "no frozen weights are kept: call unfreeze(keep_frozen=True), or take the frozen "
                    "embeddings from embeddings.embed_quadruplets before training"
                )
            self.eval()
            try:
                yield self
            finally:
                self.model = trained
                self.train(training)

    def export(self, folder: str | Path, weights: Mapping[str, torch.Tensor] | None = None) -> Path:
        """Write the merged weights and the config where open_clip finds them; return the weights file.

        Load with open_clip.create_model(name, pretrained=FILE) or open_clip.create_model("local-dir:FOLDER").
        `weights`: what exported_state_dict() gives, where the model itself holds but a slice of each.
        """
        folder = Path(folder)
        save_tensors(folder / WEIGHTS_NAME, weights or self.exported_state_dict(), {"format": "pt"})
        save_json(folder / CONFIG_NAME, self.config)
        if isinstance(self.tokenizer, HFTokenizer):
            self.tokenizer.tokenizer.save_pretrained(str(folder))
        return folder / WEIGHTS_NAME

    def exported_state_dict(self) -> dict[str, torch.Tensor]:
        """The weights as open_clip names them, adapters merged."""
        names = packed_names(self.model)
        return {names.get(name, name): tensor for name, tensor in merged_state_dict(self.model).items()}

    def hash_weights(self) -> str:
        """SHA-256 of the architecture and the weights, adapters merged: what caches are named by."""
        digest = hashlib.sha256(json.dumps(self.config["model_cfg"], sort_keys=True).encode())
        for name, tensor in sorted(self.exported_state_dict().items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()


def load_clip(name: str, pretrained: str = "", device: str | torch.device = "cpu") -> ClipModel:
    """Load an open_clip model, frozen, with its preprocessing and tokenizer.

    Args:
        name: a model that open_clip or this package knows ("ViT-L-14-quickgelu", "ViT-small-8-64"), an
            architecture as JSON ("my-clip.json"), "local-dir:FOLDER" or "hf-hub:ORG/MODEL".
        pretrained: a tag ("openai", "laion2b_s32b_b82k") or a weights file; empty for local-dir: and hf-hub:.
            Empty otherwise means random weights, with a warning.
        device: where the model goes.

    Raises:
        ValueError: unknown name or tag (with the nearest known one), weights that do not fit the model or are
            damaged, a config that open_clip cannot build.
        FileNotFoundError: a JSON, weights file or folder that is not there.
        OSError: the weights of a tag could not be downloaded.
    """
    schema, _ = open_clip.factory.parse_model_name(name)
    if schema is None:
        name = _register(name) if name.endswith(".json") else name
        _check_name(name)
        _check_pretrained(name, pretrained)
        if not pretrained:
            warnings.warn(f"{name} starts from random weights: give a pretrained tag or file", stacklevel=2)
    try:
        model, _, preprocess = open_clip.create_model_and_transforms(name, pretrained=pretrained or None, device=device)
    except (OSError, ValueError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # open_clip reads weights and configs unchecked: anything may come out
        lines = [line.strip() for line in str(error).splitlines()]
        misfits = [line for line in lines if "size mismatch" in line or "key" in line or "pos_embed" in line]
        if misfits:
            raise ValueError(f"weights {pretrained or name} do not fit model {name}: {misfits[0][:300]}") from error
        if "download" in str(error):
            raise OSError(
                f"could not download {pretrained} for {name} ({error}); where there is no network, "
                "pass a weights file or local-dir:FOLDER"
            ) from error
        raise ValueError(
            f"open_clip cannot load {name} {pretrained}: are config and weights whole? "
            f"({type(error).__name__}: {error!s:.300})"
        ) from error
    config = {
        "model_cfg": open_clip.get_model_config(name),
        "preprocess_cfg": open_clip.get_model_preprocess_cfg(model),
    }
    return ClipModel(model, name, preprocess, open_clip.get_tokenizer(name), config).to(device)


def _register(path: str) -> str:
    """Make an architecture JSON known to open_clip under its file name."""
    file = Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"model config {path} not found")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:  # also text that is not UTF-8
        raise ValueError(f"model config {path} is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"model config {path} must be a JSON object, not {type(config).__name__}")
    missing = [key for key in ("embed_dim", "vision_cfg", "text_cfg") if key not in config]
    if missing:
        hint = f"; for a folder written by open_clip use local-dir:{file.parent}" if "model_cfg" in config else ""
        raise ValueError(f"model config {path} lacks {', '.join(missing)}{hint}")
    known = open_clip.get_model_config(file.stem)
    if known is not None and known != config:
        raise ValueError(f"model config {path}: {file.stem} is already the name of another model, rename the file")
    open_clip.add_model_config(file)
    return file.stem


def _check_name(name: str) -> None:
    known = open_clip.list_models()
    if name.replace("/", "-") not in known:
        near = difflib.get_close_matches(name, known, 1)
        hint = f", did you mean {near[0]!r}?" if near else "; open_clip.list_models() lists them"
        raise ValueError(f"unknown model {name!r}{hint}")


def _check_pretrained(name: str, pretrained: str) -> None:
    tags = open_clip.list_pretrained_tags_by_model(name)
    if not pretrained or pretrained in tags or Path(pretrained).is_file():
        return
    if "/" in pretrained or Path(pretrained).suffix:
        raise FileNotFoundError(f"weights file {pretrained} not found")
    near = difflib.get_close_matches(pretrained, tags, 1)
    hint = f", did you mean {near[0]!r}?" if near else ""
    raise ValueError(f"unknown tag {pretrained!r} for {name}{hint} Known: {', '.join(tags) or 'none'}; or a file")


def _text_tower(model: Any) -> Any:
    """The module that holds the text encoder's parts (open_clip's CLIP keeps them at the top level)."""
    return getattr(model, "text", model)


def _pooling(model: Any) -> str:
    return getattr(model, "text_pool_type", None) or getattr(_text_tower(model), "pool_type", None) or ""


def _eos_id(model: Any) -> int:
    return getattr(model, "text_eos_id", None) or _text_tower(model).eos_id
