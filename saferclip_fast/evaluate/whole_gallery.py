"""Where the unsafe items lie among all items of a gallery, exactly, a block of queries at a time."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

SCORES = 1 << 22  # scores held at a time, which bounds memory whatever the gallery's size


class Standing(NamedTuple):
    """How the unsafe items of a gallery stand against the safe ones, for each of Q queries; float32 [Q]."""

    first_unsafe: Tensor  # the place of the first unsafe item, from 1; NaN where there is none
    safe_above: Tensor  # P(safe item scores above unsafe item), ties half; NaN where there is no such pair
    unsafe_share: Tensor  # of the first R items


def standing(queries: Tensor, gallery: Tensor, unsafe: Tensor, right: Tensor) -> Standing:
    """Ranks the whole gallery for every query by cosine, the lower row first where two scores are equal.

    Args:
        queries: [Q, d]; gallery: [G, d]; any scale.
        unsafe: bool [G]: the item is unsafe.
        right: int64 [Q]: R, how many items are right for the query, 1 to G.

    Returns, for a query with the scores s, U unsafe items and S safe ones:
        first_unsafe = min of the places of the unsafe items;
        safe_above = sum over safe i, unsafe j of ([s_i > s_j] + [s_i = s_j] / 2) / (S U), the area under the ROC curve;
        unsafe_share = the unsafe ones among the first R, over R.
    """
    gallery = F.normalize(gallery, dim=-1)
    rows = max(1, SCORES // len(gallery))
    parts = [
        _standing_of(F.normalize(block, dim=-1) @ gallery.T, unsafe, wanted)
        for block, wanted in zip(queries.split(rows), right.split(rows), strict=True)
    ]
    return Standing(*(torch.cat(part) for part in zip(*parts, strict=True)))


def _standing_of(scores: Tensor, unsafe: Tensor, right: Tensor) -> Standing:
    """The same from the scores [B, G] of a block."""
    count, nothing = int(unsafe.sum()), scores.new_full((len(scores),), float("nan"))
    ordered, order = scores.sort(dim=1, descending=True, stable=True)
    is_unsafe = unsafe[order]
    share = is_unsafe.cumsum(1).gather(1, right[:, None] - 1)[:, 0] / right
    if not count:
        return Standing(nothing, nothing, share)
    first = is_unsafe.byte().argmax(1) + 1.0  # of equal ones argmax gives the first
    if count == len(unsafe):
        return Standing(first, nothing, share)
    low, safe = (ordered[kept].view(len(scores), -1).flip(1).contiguous() for kept in (is_unsafe, ~is_unsafe))
    below = torch.searchsorted(low, safe) + torch.searchsorted(low, safe, right=True)  # twice the count, ties once
    return Standing(first, (below.sum(1).double() / (2 * count * safe.shape[1])).float(), share)
