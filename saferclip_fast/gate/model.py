"""The gated model: two models and a guard, used as one."""

from __future__ import annotations

import copy
import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..data.packed_captions import PackedCaptions
from ..errors import UserError
from ..evaluate import check_same_space
from ..guard import Guard
from ..guard.model import FILE, MODALITIES
from ..models import ClipModel
from ..models.identity import differences, identify
from ..results import GATE_FILE, GATE_FORMAT
from ..storage.claim import claim
from ..storage.files import save_json
from .places import FROZEN, TUNED, check_new, check_threshold

_OF_THE_FROZEN = ("preprocess", "tokenizer", "config", "pad_id", "context_length", "masks_padding", "trims_text")


class GateError(UserError, ValueError):
    """A gate of models that do not belong together, a damaged one, or one where a single set of weights is needed."""


class GatedModel(ClipModel):
    """Every input in the frozen model's embedding, and what the guard finds unsafe in the tuned model's.

    An input x of a modality with threshold t, f0 and f1 the two encoders and P(unsafe) from the guard:

        f(x) = f1(x) if t < 1 and P(unsafe | f0(x)) >= t else f0(x)

    At t = 0 it is the tuned model, at 1 the frozen one. A modality that the guard does not know keeps f0. Rows that
    keep f0 are those of the frozen model for the same batch, bit for bit. After "gated adapters" (UpSafe, arXiv
    2510.02194); ours: the guard in place of a router in each layer, a hard choice, and two whole models.

    Attributes:
        guard: the guard, with the frozen model as `guard.clip`.
        tuned: the tuned model.
        thresholds: {"text": t, "image": t}.
    """

    def __init__(self, guard: Guard, tuned: ClipModel, thresholds: Mapping[str, float]) -> None:
        """Use sf.gate or sf.load_gate. Raises GateError or ValueError where the models do not belong together."""
        nn.Module.__init__(self)  # not ClipModel's: both models are prepared already
        check_pair(guard.clip, tuned)
        for name in _OF_THE_FROZEN:
            setattr(self, name, getattr(guard.clip, name))
        self.name = f"{tuned.name}, gated"
        self.guard = guard
        self.model = _Both(guard, tuned.to(guard.clip.device))
        self._twin = []
        self._set(thresholds)
        self.eval()

    def at(self, threshold: float | Mapping[str, float]) -> GatedModel:
        """The same gate, sharing all weights, with another threshold: a number, or {"text": t, "image": u}."""
        other = copy.copy(self)
        other._set(dict.fromkeys(MODALITIES, threshold) if isinstance(threshold, int | float) else threshold)
        return other

    def _set(self, thresholds: Mapping[str, float]) -> None:
        for value in thresholds.values():
            check_threshold(value)
        self.thresholds = {name: float(thresholds[name]) for name in MODALITIES}
        self.weights_hash = self.hash_weights()

    @property
    def tuned(self) -> ClipModel:
        return self.model.tuned

    @property
    def logit_scale(self) -> Tensor:
        """The frozen model's, which fine-tuning leaves as it is."""
        return self.model.logit_scale

    def encode_image(self, images: Tensor, normalize: bool = False) -> Tensor:
        """Images [B, 3, H, W], preprocessed -> embeddings [B, d], unit rows with `normalize`."""
        return self._encode("image", images, lambda rows: images[rows], normalize)

    def encode_text(self, text: Tensor | PackedCaptions, normalize: bool = False) -> Tensor:
        """Token ids [N, L], or packed captions -> embeddings [N, d], unit rows with `normalize`."""

        def some(rows: Tensor) -> Tensor:
            return text.tokens_of(rows, self.pad_id) if isinstance(text, PackedCaptions) else text[rows]

        return self._encode("text", text, some, normalize)

    def _encode(self, modality: str, inputs: Any, some: Callable[[Tensor], Tensor], normalize: bool) -> Tensor:
        """`some` gives the inputs of the rows that it is asked for."""
        frozen, tuned = (getattr(clip, f"encode_{modality}") for clip in (self.guard.clip, self.tuned))
        embeddings = frozen(inputs)
        if len(rows := self.sent(modality, embeddings)):
            embeddings = embeddings.index_put((rows,), tuned(some(rows)).to(embeddings.dtype))
        return F.normalize(embeddings, dim=-1) if normalize else embeddings

    @torch.no_grad()
    def sent(self, modality: str, embeddings: Tensor) -> Tensor:
        """The rows, int64 [k], of the frozen model's embeddings [n, d] that the tuned model embeds again.

        Raises ValueError for a row with NaN or Inf, or of zeros alone.
        """
        head, threshold = getattr(self.guard, modality), self.thresholds[modality]
        if head is None or threshold == 1 or not len(embeddings):
            return torch.empty(0, dtype=torch.int64, device=embeddings.device)
        with torch.autocast(embeddings.device.type, enabled=False):  # P near 0 or 1 has no digits to spare
            return (head(embeddings.float()) >= threshold).nonzero().flatten()

    def pack(self, tokens: Tensor, lengths: Sequence[int]) -> Tensor | PackedCaptions:
        return self.guard.clip.pack(tokens, lengths)

    def train(self, mode: bool = True) -> GatedModel:
        """Stays in evaluation mode: a gate is not trained."""
        nn.Module.train(self, False)
        return self

    def save(self, folder: str | os.PathLike) -> Path:
        """Writes frozen/ and tuned/ (open_clip folders), guard.safetensors and gate.json to a new or empty folder.

        gate.json, with the hashes of all, comes last: without it the folder is no gate.

        Raises FileExistsError where the folder holds files.
        """
        folder = Path(folder)
        check_new(folder)
        clips = {FROZEN: self.guard.clip, TUNED: self.tuned}
        with claim(folder):
            for name, clip in clips.items():
                clip.export(folder / name)
            self.guard.save(folder / FILE)
            described = {name: {"name": clip.name, "weights_hash": clip.weights_hash} for name, clip in clips.items()}
            described["guard"] = {"heads_hash": hash_heads(self.guard)}
            save_json(folder / GATE_FILE, {"format": GATE_FORMAT, "thresholds": self.thresholds, **described})
        return folder

    def hash_weights(self) -> str:
        """SHA-256 of what the two models, the guard's heads and the thresholds are."""
        digest = hashlib.sha256(f"{self.guard.clip.weights_hash} {self.tuned.weights_hash}".encode())
        digest.update(f"{hash_heads(self.guard)} {json.dumps(self.thresholds, sort_keys=True)}".encode())
        return digest.hexdigest()


class _Both(nn.Module):
    """The two models and the guard's heads, which move between devices together."""

    def __init__(self, guard: Guard, tuned: ClipModel) -> None:
        super().__init__()
        self.frozen, self.tuned = guard.clip, tuned
        self.heads = nn.ModuleList(filter(None, (guard.text, guard.image)))

    @property
    def logit_scale(self) -> Tensor:
        return self.frozen.model.logit_scale  # type: ignore[return-value]

    def state_dict(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Raises GateError: whoever asks takes one set of weights for the whole model."""
        raise GateError(
            "a gate embeds each input by one of two models, which no one set of weights does: keep it with "
            "gated.save(FOLDER) and sf.load_gate(FOLDER), or take the tuned model alone, gated.tuned"
        )


def hash_heads(guard: Guard) -> str:
    """SHA-256 of a guard's heads."""
    digest = hashlib.sha256()
    for name in MODALITIES:
        head = getattr(guard, name)
        for key, value in sorted(head.state_dict().items()) if head is not None else ():
            digest.update(f"{name}.{key} {tuple(value.shape)}".encode())
            digest.update(value.detach().cpu().contiguous().numpy().data)
    return digest.hexdigest()


def check_pair(frozen: ClipModel, tuned: ClipModel) -> None:
    """Raises GateError or ValueError where two models cannot take the same inputs into one space."""
    if isinstance(tuned, GatedModel):
        raise GateError(f"{tuned.name} is a gate already: give its tuned model, gated.tuned")
    if any(parameter.requires_grad for parameter in tuned.parameters()):
        raise GateError(f"{tuned.name} is being trained: give the run's folder, or sf.load(RUN)")
    check_same_space(tuned, frozen)
    alike = replace(identify(frozen), weights_hash=tuned.weights_hash, behavior={})
    if found := differences(alike, identify(tuned)):
        raise GateError(
            f"the tuned model takes other inputs than the guard's frozen model: {', '.join(found)}; give the model "
            "that was tuned from that one"
        )
