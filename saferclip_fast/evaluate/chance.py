"""What a metric would be if the items of a gallery came in random order: figures near it say nothing of a model."""

from __future__ import annotations

import torch
from torch import Tensor


def any_among(wanted: Tensor, gallery: int, k: int) -> Tensor:
    """The probability that at least one of W wanted items is among the first K of a gallery of G.

    Args:
        wanted: W, whole numbers of any shape; gallery: G; k: K.

    Returns 1 - C(G - W, K) / C(G, K), float64 of the shape of `wanted`. About K W / G where that is small.
    """
    drawn = torch.arange(min(k, gallery), dtype=torch.float64)
    left = (gallery - wanted.double()[..., None] - drawn).clamp(min=0)
    return 1 - (left / (gallery - drawn)).prod(-1)


def first_place(wanted: int, gallery: int) -> float:
    """The mean place of the first of W wanted items in a gallery of G, from 1: (G + 1) / (W + 1)."""
    return (gallery + 1) / (wanted + 1)
