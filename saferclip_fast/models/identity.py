"""What a frozen model is: its weights, preprocessing and tokenizer by hashes, and what it computes on fixed inputs."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import numpy
import open_clip
import torch
from PIL import Image
from torch import Tensor

from .clip import ClipModel

FORMAT = "saferclip_fast.frozen.v1"
CAPTIONS = ("Two DOGS are running, aren't they?", "naïve café ☃ pneumonoultramicroscopicsilicovolcanoconiosis")
_TOKENIZED = (*CAPTIONS, "  A\tred\nSQUARE &amp; <b>100 %</b>  ", "long " * 100, "日本語 ПРИВЕТ — “quoted”", "x")
_NUMBERS = 16  # of each embedding
# Relative distance of what was computed then and now. Measured on random weights, the hardest case: rounding (float64,
# other threads) gives up to 1.2e-6 and another rounding of one pixel in 20 up to 1.4e-3, while another activation
# (gelu, quick_gelu) gives at least 4.7e-3 and another mean or deviation 1e-2. Trained weights lie further apart.
TOLERANCE = 2e-3


@dataclass(frozen=True)
class Identity:
    """What a frozen model is; of a run from before there were such records, its weights alone."""

    weights_hash: str  # of weights and architecture
    preprocessing: dict[str, Any] | None = None
    tokenizer_hash: str = ""
    open_clip: str = ""  # its version
    behavior: dict[str, list[float]] = field(default_factory=dict)  # a few numbers of each output

    def as_json(self) -> dict[str, Any]:
        """The record that a run keeps."""
        return {"format": FORMAT, **asdict(self)}

    @classmethod
    def from_json(cls, value: Any) -> Identity:
        """Inverse of as_json. Raises ValueError with the reason where the value is no such record."""
        if not isinstance(value, dict) or value.get("format") != FORMAT:
            raise ValueError(f"its format is not {FORMAT}")
        names = {item.name for item in fields(cls)}
        if missing := names - value.keys():
            raise ValueError(f"it has no {min(missing)}")
        found = cls(**{name: value[name] for name in names})
        if not all(isinstance(text, str) for text in (found.weights_hash, found.tokenizer_hash, found.open_clip)):
            raise ValueError("a hash is not text")
        if not isinstance(found.preprocessing, dict) or not _are_numbers(found.behavior):
            raise ValueError("preprocessing or behavior is of another kind")
        return found


def identify(clip: ClipModel) -> Identity:
    """The identity of a model as load_clip returns it, without adapters."""
    return Identity(
        clip.weights_hash,
        json.loads(json.dumps(clip.preprocessing)),  # as a file gives it back: lists, no tuples
        _hash_tokenizer(clip),
        open_clip.__version__,
        _behavior(clip),
    )


def differences(then: Identity, now: Identity) -> list[str]:
    """What of `then` is not so `now`, in words; nothing for the same model."""
    found = []
    if then.weights_hash != now.weights_hash:
        found.append("weights or architecture")
    if then.preprocessing is not None and then.preprocessing != now.preprocessing:
        found.append(f"preprocessing ({_changed(then.preprocessing, now.preprocessing or {})})")
    if then.tokenizer_hash and then.tokenizer_hash != now.tokenizer_hash:
        found.append(f"tokenizer ({now.tokenizer_hash[:12]}, was {then.tokenizer_hash[:12]})")
    # other weights or pixels behave otherwise as a matter of course
    far = {name: size for name, size in _distances(then.behavior, now.behavior).items() if not size <= TOLERANCE}
    if far and not found:
        found.append(f"behavior ({', '.join(f'{name} by {size:.1e}' for name, size in far.items())})")
    return found


def _hash_tokenizer(clip: ClipModel) -> str:
    tokens: Tensor = clip.tokenizer(list(_TOKENIZED))
    return hashlib.sha256(json.dumps(tokens.tolist()).encode()).hexdigest()


@torch.no_grad()
def _behavior(clip: ClipModel) -> dict[str, list[float]]:
    pixels = clip.preprocess(_picture())
    with _full_precision():
        image = clip.encode_image(pixels[None].to(clip.device))
        texts = clip.encode_text(clip.tokenizer(list(CAPTIONS)).to(clip.device))
    # channel means and deviations too: random weights, of a ResNet above all, hardly see another mean
    found = {"pixels": torch.cat([pixels.mean((1, 2)), pixels.std((1, 2))]), "image": image[0, :_NUMBERS]}
    found |= {f"text {number}": row[:_NUMBERS] for number, row in enumerate(texts, 1)}
    return {name: [float(f"{x:.7g}") for x in row.tolist()] for name, row in found.items()}


def _picture() -> Image.Image:
    """A fixed picture, not square, with colors and edges."""
    y, x = numpy.mgrid[0:96, 0:128]
    return Image.fromarray(numpy.stack([x * 2, y * 5 + x, x * y // 7], axis=-1).astype(numpy.uint8))


@contextlib.contextmanager
def _full_precision() -> Iterator[None]:
    """No TF32, which a run may have allowed."""
    before, convolutions = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
        torch.backends.cudnn.allow_tf32 = convolutions


def _distances(then: Mapping[str, list[float]], now: Mapping[str, list[float]]) -> dict[str, float]:
    """Relative distance of each output, infinite for one that is not there or has another size."""
    found = {}
    for name, numbers in then.items():
        a, b = torch.tensor(numbers).double(), torch.tensor(now.get(name, [])).double()
        same_size = a.shape == b.shape
        found[name] = float((a - b).norm() / a.norm().clamp_min(1e-12)) if same_size else float("inf")
    return found


def _changed(then: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    keys = sorted(key for key in {*then, *now} if then.get(key) != now.get(key))
    return ", ".join(f"{key} {now.get(key)}, was {then.get(key)}" for key in keys)


def _are_numbers(value: Any) -> bool:
    rows = list(value.values()) if isinstance(value, dict) else [None]
    return all(isinstance(row, list) and all(isinstance(x, float) for x in row) for row in rows)
