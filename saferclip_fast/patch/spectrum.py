"""How much of a gradient lies in its first directions, layer by layer (Safety at One Shot)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..models import ClipModel
from ..models.lora import adaptable_layers

RANKS = (1, 2, 4, 8, 16, 32)


class Spectrum(NamedTuple):
    """The gradient of one weight."""

    name: str
    norm: float  # of the whole gradient
    energy: tuple[float, ...]  # the part of its square that its first r directions hold, r in RANKS


def spectra(clip: ClipModel, loss: Callable[[], Tensor]) -> list[Spectrum]:
    """The gradient of `loss` at every weight that an adapter can change, in the model's order.

    With the singular values s of a gradient as a matrix [out, rest],

        energy at r = sum of the r largest s^2 / sum of all s^2        (arXiv 2601.01887 for language models)

    Args:
        clip: a frozen model, without adapters; it is left as it was.
        loss: computes a scalar with `clip`.
    """
    names = [f"{name}.weight" for name in adaptable_layers(clip.model)]
    weights = [clip.model.get_parameter(name).requires_grad_() for name in names]
    try:
        gradients = torch.autograd.grad(loss(), weights, allow_unused=True)
    finally:
        clip.model.requires_grad_(False)
    found = [(name, x) for name, x in zip(names, gradients, strict=True) if x is not None]
    return [Spectrum(name, float(x.norm()), _energy(x)) for name, x in found]


def of_all(layers: Sequence[Spectrum]) -> tuple[float, ...]:
    """The part of the whole gradient's square that the first r directions of every layer hold."""
    squares = [layer.norm**2 for layer in layers]
    if not sum(squares):
        return (1.0,) * len(RANKS)
    return tuple(
        sum(square * layer.energy[place] for square, layer in zip(squares, layers, strict=True)) / sum(squares)
        for place in range(len(RANKS))
    )


def _energy(gradient: Tensor) -> tuple[float, ...]:
    """1 at every rank for a gradient of 0."""
    rows = gradient.detach().double().flatten(1)
    rows = rows if len(rows) <= rows.shape[1] else rows.T
    squares = torch.linalg.eigvalsh(rows @ rows.T).clamp(min=0).flip(0).cumsum(0)
    if not squares[-1] > 0:
        return (1.0,) * len(RANKS)
    return tuple(float(squares[min(rank, len(squares)) - 1] / squares[-1]) for rank in RANKS)
