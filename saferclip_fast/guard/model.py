"""The guard: a small head on frozen embeddings for texts, one for images, and the file that holds them."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ..embeddings import embed_images, embed_texts
from ..errors import UserError
from ..models import ClipModel
from ..models.identity import Identity, differences, identify
from ..ops.checks import check_finite, check_matrix, near_one
from ..results import GUARD_FORMAT
from ..storage.files import save_tensors

FILE = "guard.safetensors"  # in a run's folder
MODALITIES = ("text", "image")


class GuardError(UserError, ValueError):
    """A guard's file is damaged, or belongs to another frozen model."""


class Head(nn.Module):
    """P(unsafe) of one modality's embeddings: p = sigmoid(scale * f((x / |x| - mean) / std) + shift).

    f is linear or has one hidden layer; mean and std [d] are those of the training rows; scale and shift calibrate
    (Platt, 1999).
    """

    mean: Tensor
    std: Tensor
    calibration: Tensor

    def __init__(self, modality: str, width: int, hidden: int = 0) -> None:
        """modality: "text" or "image", for messages. width: d. hidden: units of the hidden layer, 0 for none."""
        super().__init__()
        self.modality = modality
        sizes = (width, hidden, 1) if hidden else (width, 1)
        layers: list[nn.Module] = []
        for inputs, outputs in itertools.pairwise(sizes):
            layers += [nn.ReLU()] if layers else []
            layers.append(nn.Linear(inputs, outputs))
        self.layers = nn.Sequential(*layers)
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("std", torch.ones(width))
        self.register_buffer("calibration", torch.tensor([1.0, 0.0]))  # scale, shift

    @property
    def hidden(self) -> int:
        """Units of the hidden layer, 0 for none."""
        return 0 if len(self.layers) == 1 else self.layers[0].out_features  # type: ignore[return-value]

    def score(self, embeddings: Tensor) -> Tensor:
        """float32 [n]: the log-odds before calibration of rows [n, d]."""
        unit = F.normalize(near_one(embeddings)[0], dim=-1).float()
        return self.layers((unit - self.mean) / self.std).squeeze(-1)

    def forward(self, embeddings: Tensor) -> Tensor:
        """P(unsafe), float32 [n], of the frozen model's embeddings [n, d] of any scale.

        Raises TypeError or ValueError for another shape, width or device, and for rows with NaN or Inf or of zeros
        alone, which nothing can be said of.
        """
        check_matrix("embeddings", embeddings, (f"the {self.modality} guard", self.mean[None]))
        check_finite("embeddings", embeddings)
        if len(zeros := (~embeddings.any(-1)).nonzero()):
            raise ValueError(f"embeddings row {int(zeros[0, 0])} is all zeros and has no direction; drop this row")
        scale, shift = self.calibration
        return torch.sigmoid(scale * self.score(embeddings) + shift)


@dataclass(frozen=True, repr=False)
class Guard:
    """P(unsafe) of texts and images.

    Attributes:
        clip: the frozen model that it belongs to.
        text, image: call one with that model's embeddings [n, d] of any scale: P(unsafe), float32 [n]. None where the
            training data had nothing unsafe of the kind.
        figures: the content of guard.json (docs/guard.md): on what it was fitted, how well it tells.
    """

    clip: ClipModel
    text: Head | None
    image: Head | None
    figures: Mapping[str, Any]

    def of_texts(self, texts: Sequence[str]) -> Tensor:
        """P(unsafe), float32 [n], of n texts; a single text is one of 1."""
        head = self._head("text")
        texts = [texts] if isinstance(texts, str) else list(texts)
        if not texts:
            return head.mean.new_empty(0)
        return head(embed_texts(self.clip, texts, progress=False).to(self.clip.device))

    def of_images(self, images: Sequence[Image.Image]) -> Tensor:
        """P(unsafe), float32 [n], of n PIL images; a single image is one of 1."""
        head = self._head("image")
        images = [images] if isinstance(images, Image.Image) else list(images)
        if not images:
            return head.mean.new_empty(0)
        pixels: Any = [(self.clip.preprocess(image.convert("RGB")), 0) for image in images]
        return head(embed_images(self.clip, pixels, progress=False)[0].to(self.clip.device))

    def _head(self, modality: str) -> Head:
        head: Head | None = getattr(self, modality)
        if head is None:
            raise GuardError(f"this guard knows no {modality}s: its training data had no unsafe {modality}")
        return head

    def save(self, path: str | Path) -> None:
        """Writes the heads, the identity of the frozen model and the figures to a safetensors file, atomically."""
        heads = {name: head for name in MODALITIES if (head := getattr(self, name)) is not None}
        tensors = {f"{name}.{key}": x for name, head in heads.items() for key, x in head.state_dict().items()}
        metadata = {
            "format": GUARD_FORMAT,
            "frozen": json.dumps(identify(self.clip).as_json()),
            "figures": json.dumps(self.figures),
        }
        save_tensors(path, tensors, metadata)

    @classmethod
    def read(cls, path: Path, clip: ClipModel) -> Guard:
        """Inverse of save. Raises GuardError for a damaged file, and where `clip` is another frozen model."""
        try:
            with safe_open(path, framework="pt", device="cpu") as file:
                metadata = dict(file.metadata() or {})
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
            if metadata.get("format") != GUARD_FORMAT:
                raise ValueError(f"its format is not {GUARD_FORMAT}")
            recorded = Identity.from_json(json.loads(metadata["frozen"]))
            figures = json.loads(metadata["figures"])
            heads = {name: _head_of(name, tensors) for name in MODALITIES}
        except (SafetensorError, ValueError, KeyError, RuntimeError, RecursionError) as error:
            raise GuardError(f"{path} is no guard, or is damaged ({error}): fit it again") from error
        if found := differences(recorded, identify(clip)):
            raise GuardError(
                f"{path} belongs to the frozen model {recorded.weights_hash[:12]}, and {clip.name} is "
                f"{clip.weights_hash[:12]}; what differs: {', '.join(found)}; give that model, or fit a guard for this"
            )
        heads = {name: head and head.to(clip.device) for name, head in heads.items()}
        return cls(clip, heads["text"], heads["image"], figures)


def _head_of(modality: str, tensors: Mapping[str, Tensor]) -> Head | None:
    """The head in a file's tensors, None where it has none. Raises RuntimeError or KeyError where they do not fit."""
    state = {k.removeprefix(f"{modality}."): x for k, x in tensors.items() if k.startswith(f"{modality}.")}
    if not state:
        return None
    hidden = len(state["layers.0.bias"]) if "layers.2.bias" in state else 0
    head = Head(modality, len(state["mean"]), hidden)
    head.load_state_dict(state)
    return head.requires_grad_(False).eval()
