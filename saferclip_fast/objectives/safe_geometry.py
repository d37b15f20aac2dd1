"""The geometry of safe rows, kept by two terms (SAGE, arXiv 2607.00402): their spread, and which of them are alike.

With z_i the unit rows of the n safe texts (or images) of a batch, frozen rows with a 0, S = mean_i |z_i - mean z|^2,

    spread    = max(0, S0 - S)
    neighbors = 1 - mean over (i, j) of Z(z_i . z_j) Z(z0_i . z0_j)    j among the K nearest others of i, frozen

Z takes the mean over these pairs off and divides by their standard deviation, so that the last mean is the pairs'
correlation. Ours, where the source leaves it open: neighbors are sought within the batch, since both rows of a pair are
then trained, and Z is over the pairs alone, since a model that turns its space then has neighbors = 0, the least.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..ops import nearest_safe
from ..runtime.ranks import ALONE, Share
from .common import unit

NEIGHBORS = 15  # the paper's, and those that `evaluate` counts
FLAT = 1e-8  # ours: pairs of less variance are all alike; bfloat16 encoders round cosines by more than its root, 1e-4


def spread_lost(rows: Tensor, frozen: Tensor) -> Tensor:
    """max(0, S0 - S) of rows [n, d] of any scale and the frozen ones: a scalar, 0 to 1."""
    before, now = ((x - x.mean(0)).square().sum(1).mean() for x in (unit(frozen), unit(rows)))
    return (before - now).clamp(min=0)


def neighbors_lost(rows: Tensor, frozen: Tensor, k: int = NEIGHBORS, *, backend: str = "auto") -> Tensor:
    """1 - correlation of the neighbor pairs' similarities, now and frozen: a scalar, 0 to 2.

    Args:
        rows, frozen: [n, d] of any scale. Of fewer than 3 rows all pairs are alike: 0.
        k: neighbors of each row, at most n - 1; found without gradient.
        backend: of the search.
    """
    now, before = unit(rows), unit(frozen)
    k = min(k, len(rows) - 1)
    if k < 2:
        return now.sum() * 0
    found = nearest_others(before, k, backend=backend)
    z, z0 = ((x.unsqueeze(1) * x[found]).sum(-1).flatten() for x in (now, before))
    z, z0 = z - z.mean(), z0 - z0.mean()
    return 1 - (z * z0).mean() / (z.square().mean().clamp(min=FLAT) * z0.square().mean().clamp(min=FLAT)).sqrt()


def nearest_others(rows: Tensor, k: int, *, backend: str = "auto") -> Tensor:
    """int64 [n, k]: the k nearest others of each unit row [n, d], in no order; k < n."""
    found = nearest_safe(rows, rows, k + 1, backend=backend, check=False).indices
    own = found == torch.arange(len(rows), device=rows.device).unsqueeze(1)
    own[:, -1] |= ~own.any(1)  # pushed out by more equal rows: any of these may go
    return found[~own].view(len(rows), k)


def of_batch(term: Callable[[Tensor, Tensor], Tensor], rows: Tensor, frozen: Tensor, share: Share = ALONE) -> Tensor:
    """term(rows, frozen) of the whole batch, or this rank's share of it, where a term is no sum over rows.

    Every rank computes the whole term, with gradient to its own rows; its value counts by its part of the rows.
    """
    if share.whole:
        return term(rows, frozen)
    every, first = share.gather(rows), share.first
    every = torch.cat([every[:first], rows, every[first + len(rows) :]])
    whole = term(every, share.gather_once(frozen))
    return whole - (1 - share.fraction) * whole.detach()
