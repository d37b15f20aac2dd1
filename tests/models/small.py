"""Any architecture that open_clip lists, made small: a layer or so, narrow, on small images, with random weights.

Only sizes change. What an architecture does otherwise (pooling, biases, masks, its tokenizer's padding) stays: it tells
it from the others.
"""

from __future__ import annotations

import contextlib
import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import open_clip
import timm
from timm.models.vitamin import VitCfg, VitConvCfg

WIDTH, SIZE, WORDS = 64, 32, 512  # of every encoder; of images; of a tokenizer that is no CLIP's

# The first entry that begins the name of a timm model gives the options that make it small.
TIMM: dict[str, dict[str, Any]] = {
    "convnext": {"depths": (1, 1, 1, 1), "dims": (16, 32, 48, 64)},
    "fastvit_mci3": {"layers": (1,) * 5, "embed_dims": (32, 32, 64, 64, 64)},
    "fastvit_mci4": {"layers": (1,) * 5, "embed_dims": (32, 32, 64, 64, 64)},
    "fastvit": {"layers": (1,) * 4, "embed_dims": (32, 32, 64, 64)},
    "swin": {"img_size": SIZE, "window_size": 2, "embed_dim": 16, "depths": (1,) * 4, "num_heads": (1, 2, 2, 4)},
    "vitamin": {
        "img_size": SIZE,
        "embed_dim": WIDTH,
        "depth": 1,
        "num_heads": 2,
        "embed_cfg": VitCfg((16, 32, WIDTH), (1, 1, 1), 16, VitConvCfg(norm_layer="layernorm2d"), "1d"),
    },
    "vit_base_mci": {"img_size": SIZE, "depth": 1},  # its stem has the width of a ViT-B
    "vit_relpos": {"img_size": SIZE, "patch_size": 8, "embed_dim": WIDTH, "depth": 1, "num_heads": 2, "rel_pos_dim": 8},
    "": {"img_size": SIZE, "patch_size": 8, "embed_dim": WIDTH, "depth": 1, "num_heads": 2},
}
FASTVIT_SIZE = 64  # halved up to six times

# Special tokens at their ids, the padding's first where it has one of its own, by the first that begins a name.
ROBERTA, T5 = ("<s>", "<pad>", "</s>", "<unk>"), ("<pad>", "</s>", "<unk>")
SPECIAL = {
    "bert": ("[PAD]", "[CLS]", "[SEP]", "[UNK]"),
    "google/mt5": T5,
    "timm/ViT-B-16-SigLIP2": T5,
    "timm": ("<unk>", "</s>"),  # SigLIP's pads with its end of text
    "": ROBERTA,
}


def write_small(name: str, folder: Path) -> Path:
    """Writes the architecture `name`, made small, to FOLDER/small-NAME.json, its tokenizer and text model beside."""
    config = copy.deepcopy(open_clip.get_model_config(name))
    config["embed_dim"] = WIDTH
    _shrink_vision(config["vision_cfg"])
    _shrink_text(config["text_cfg"], folder)
    if "multimodal_cfg" in config:
        config["multimodal_cfg"] |= {"width": WIDTH, "heads": 2, "layers": 1, "attn_pooler_heads": 2}
        if "hf_model_name" not in config["text_cfg"]:
            config["multimodal_cfg"]["vocab_size"] = config["text_cfg"]["vocab_size"]
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"small-{name}.json"
    file.write_text(json.dumps(config))
    return file


@contextlib.contextmanager
def small_timm() -> Iterator[None]:
    """Inside, timm makes its models small."""
    create = timm.create_model

    def create_small(name: str, **options: Any) -> Any:
        return create(name, **{**options, "pretrained": False, **_first(TIMM, name)})

    with mock.patch.object(timm, "create_model", create_small):
        yield


def _shrink_vision(config: dict[str, Any]) -> None:
    timm_name = config.get("timm_model_name", "")
    config["image_size"] = FASTVIT_SIZE if timm_name.startswith("fastvit") else SIZE
    if timm_name:
        config["timm_model_pretrained"] = False
    elif isinstance(config["layers"], list):
        config |= {"layers": [1, 1, 1, 1], "width": 32, "head_width": 32}
    else:
        config |= {"layers": 1, "width": WIDTH, "head_width": 32, "patch_size": 8, "attn_pooler_heads": 2}


def _shrink_text(config: dict[str, Any], folder: Path) -> None:
    if "hf_model_name" in config:
        place = folder / "text" / config["hf_model_name"].replace("/", "-")
        _write_text_model(config["hf_model_name"], place)
        config["hf_model_name"] = str(place)
    else:
        config |= {"width": WIDTH, "heads": 2, "layers": 1, "vocab_size": config.get("vocab_size", 49408)}
    if "hf_tokenizer_name" in config:
        place = folder / "text" / config["hf_tokenizer_name"].replace("/", "-")
        _write_tokenizer(config["hf_tokenizer_name"], place)
        config["hf_tokenizer_name"] = str(place)
        config["vocab_size"] = WORDS


def _write_text_model(name: str, folder: Path) -> None:
    """A random text model of one layer, of the same class as Hugging Face's `name`."""
    from transformers import AutoModel, M2M100Config, MT5Config, RobertaConfig, XLMRobertaConfig

    encoder = {"hidden_size": WIDTH, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": WIDTH}
    roberta = encoder | {"vocab_size": WORDS, "max_position_embeddings": 514, "pad_token_id": 1}
    t5 = {"d_model": WIDTH, "d_kv": 32, "d_ff": WIDTH, "num_layers": 1, "num_decoder_layers": 1, "num_heads": 2}
    m2m = {"encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": WIDTH, "decoder_ffn_dim": WIDTH}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "max_position_embeddings": 1024}
    kinds: dict[str, Any] = {
        "roberta": lambda: RobertaConfig(**roberta),
        "xlm-roberta": lambda: XLMRobertaConfig(**roberta),
        "google/mt5": lambda: MT5Config(vocab_size=WORDS, feed_forward_proj="gated-gelu", **t5),
        "facebook/nllb": lambda: M2M100Config(vocab_size=WORDS, d_model=WIDTH, **m2m, **heads),
    }
    AutoModel.from_config(_first(kinds, name)()).save_pretrained(folder)


def _write_tokenizer(name: str, folder: Path) -> None:
    """A tokenizer with a token a byte, and the special tokens of Hugging Face's `name` where that has them."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = _first(SPECIAL, name)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = {word: number for number, word in enumerate([*special, *alphabet])}
    inner = Tokenizer(models.BPE(words, [], unk_token=next(word for word in special if "unk" in word.lower())))
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    begin = next((word for word in special if word in ("<s>", "[CLS]")), None)
    end = next(word for word in special if word in ("</s>", "[SEP]"))
    inner.post_processor = processors.TemplateProcessing(
        single=f"{begin or ''} $A {end}".strip(), special_tokens=[(x, words[x]) for x in (begin, end) if x]
    )
    pad = next((word for word in special if "pad" in word.lower()), end)
    unknown = next(word for word in special if "unk" in word.lower())
    PreTrainedTokenizerFast(
        tokenizer_object=inner, unk_token=unknown, pad_token=pad, eos_token=end, sep_token=end, cls_token=begin
    ).save_pretrained(folder)


def _first(table: dict[str, Any], name: str) -> Any:
    return next(value for begin, value in table.items() if name.startswith(begin))
