"""A gate's folder, read back: every part is what it was when the gate was saved."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..guard import Guard
from ..guard.model import FILE
from ..models import ClipModel, load_clip
from ..results import GATE_FILE, GATE_FORMAT, gate_shape, misfits
from .model import GatedModel, GateError, hash_heads
from .places import FROZEN, TUNED, check_threshold, is_gate


def load_gate(
    folder: str | os.PathLike, threshold: float | None = None, device: str | torch.device = "cpu"
) -> GatedModel:
    """The gated model that `save` or `saferclip gate` wrote, ready to use.

    Args:
        folder: its folder, wherever it was copied to.
        threshold: another one than it was saved with, of texts and images, from 0 (tuned) to 1 (frozen).
        device: where it goes.

    Raises:
        FileNotFoundError: no gate there.
        GateError: a damaged gate.json, or other weights or another guard than the gate was saved with.
        GuardError: a damaged guard.
        ValueError: weights that open_clip cannot load, or a threshold that is no probability.
    """
    path = Path(folder)
    check_threshold(threshold)
    if not is_gate(path):
        raise FileNotFoundError(f"no gate at {path / GATE_FILE}: write one with saferclip gate RUN --out DIR")
    described = described_in(path / GATE_FILE)
    frozen, tuned = (_clip(path / name, described[name], device) for name in (FROZEN, TUNED))
    guard = Guard.read(path / FILE, frozen)
    _check(path / FILE, hash_heads(guard), described["guard"]["heads_hash"])
    gated = GatedModel(guard, tuned, described["thresholds"])
    return gated if threshold is None else gated.at(threshold)


def described_in(file: Path) -> dict[str, Any]:
    """The content of gate.json."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(found, dict) or found.get("format") != GATE_FORMAT:
            raise ValueError(f"its format is not {GATE_FORMAT}")
        for misfit in misfits(found, gate_shape(found), "it"):
            raise ValueError(misfit)
        for value in found["thresholds"].values():
            check_threshold(value)
    except (ValueError, RecursionError) as error:  # also text that is not UTF-8
        raise GateError(f"{file} is damaged ({error}): make the gate again, saferclip gate RUN --out DIR") from error
    return found


def _clip(folder: Path, described: Mapping[str, str], device: str | torch.device) -> ClipModel:
    """The model of one of the two folders, if it is the one that was saved there."""
    clip = load_clip(f"local-dir:{folder}", device=device)
    _check(folder, clip.weights_hash, described["weights_hash"])
    clip.name = described["name"]
    return clip


def _check(place: Path, now: str, then: str) -> None:
    if now != then:
        raise GateError(
            f"{place} is {now[:12]}, and the gate was saved with {then[:12]}: put that one back, or make the gate "
            "again with saferclip gate RUN --out DIR"
        )
