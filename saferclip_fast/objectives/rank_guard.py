"""The rank guard: no redirected row among the first K results of any safe query (ours).

A redirected text u gets in the way of a safe image x_j (a query) where it scores above the K-th best safe text of that
query. With limit_j the score of that K-th best text, the guard is

    rank_text(u) = (1 / k) sum_j max(0, m + u . x_j - limit_j)

over the k queries of the whole bank that u violates most, found in every step: the largest u . x_j - limit_j. Texts and
images change roles for rank_image.

That search is `nearest_safe` over longer rows, exact in every backend and over ranks. With p = PARTS columns for the
limit, t = TILT, a shift that all limits have in common, which orders nothing, and C the largest t |limit_j - shift|,

    g_j = [x_j, -t (limit_j - shift) / sqrt(p) p times, pad p times] / sqrt(1 + C^2)
    asked for  [u, 1 / (t sqrt(p)) p times, 0 p times] / sqrt(1 + 1 / t^2)

where the pads bring all g_j to length 1: the product is (u . x_j - limit_j + shift) over both square roots. Columns
larger than those of x_j would make the search's int8 copy too coarse to rule rows out; a single column each took 3.6
times as long (20,000 rows, 128 queries, d 512, k 16, on AMD EPYC; now 1.1 times a search without limits).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..bank import Bank, SafeBank, ShardedBank
from ..ops import HingeOutput, Neighbors, nearest_safe, neighbor_hinge
from ..ops.backends import MAX_NATIVE_K
from .common import unit

_QUERIES = 1 << 14  # searched at a time
PARTS, TILT = 8, 4.0  # measured: 4 to 16 columns and tilts of 2 to 4 take 1.1 to 1.5 times a plain search


class Guard(NamedTuple):
    """The safe queries of one modality that redirected rows must keep away from.

    Attributes:
        bank: its text rows g_j are searched; `neighbor_hinge` reads its image rows, (q_j, -limit_j, ...) / sqrt(2).
        scale, shift: u . q_j - limit_j is scale times a score, minus shift.
    """

    bank: Bank
    scale: Tensor  # scalars on the bank's device: no value is waited for
    shift: Tensor


class RankGuards(NamedTuple):
    """What redirected texts, and redirected images, must keep away from."""

    of_text: Guard  # images as queries, and the limits of their texts
    of_image: Guard  # texts as queries, and the limits of their images


def rank_guards(bank: Bank, page: float, *, backend: str = "auto") -> RankGuards:
    """The guards of a bank's safe pairs; on the bank's device, or over its ranks.

    Args:
        bank: the safe pairs.
        page: K over the size of a gallery: 0.02 is the first 20 of 1,000 results. A bank of N pairs stands for the
            gallery, so the limit of a query is its score at rank page N.
        backend: of the search.
    """
    whole = bank.shard if isinstance(bank, ShardedBank) else bank
    pairs = ((whole.image, whole.text), (whole.text, whole.image))  # queries and their items
    return RankGuards(*(_guard(bank, q, _limits(bank, q, items, page, backend)) for q, items in pairs))


def rank_guard(
    x: Tensor, guard: Guard, k: int, margin: float, row_weights: Tensor, *, backend: str = "auto"
) -> HingeOutput:
    """values_i = (1 / k) sum_j max(0, margin + u_i . q_j - limit_j) over the k queries that u_i violates most.

    Args:
        x: [B, d] of any scale, u = x/|x|; the loss is differentiable in it. The queries are found without gradient.
        guard: of `rank_guards`. Every rank of a ShardedBank calls this function.
        k, margin: see above; fewer than k rows are fewer hinges, divided by k all the same.
        row_weights: [B] what each row's value counts in the loss.
        backend: of the search and the hinge.

    Returns:
        `HingeOutput(loss, values)`: sum_i row_weights_i values_i, and the values [B].
    """
    u = unit(x.detach())
    query = F.pad(F.pad(u, (0, PARTS), value=1 / (TILT * math.sqrt(PARTS))), (0, PARTS)) / math.hypot(1, 1 / TILT)
    found = guard.bank.nearest(query, min(k, len(guard.bank)), backend=backend, check=False)
    near, found = guard.bank.gather(found)
    half_violation = (found.scores * guard.scale - guard.shift) / 2
    found = Neighbors(half_violation, found.indices)
    return neighbor_hinge(x, near.image, found, row_weights, margin=margin, k=k, backend=backend)


def _limits(bank: Bank, query: Tensor, items: Tensor, page: float, backend: str) -> Tensor:
    """[Q] the score of each query at rank page N among all items of the bank, or of a sample (docs/method.md).

    query, items: [Q, d] rows that this rank holds, of one modality and of the other.
    """
    count = min(len(bank), math.floor(MAX_NATIVE_K / page))  # in so large a sample the kernels' largest k is that rank
    # one of each N / count rows, at random: rows at even distances may all be of one kind. The same on every rank.
    within = torch.rand(count, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    sample = ((torch.arange(count) + within) * (len(bank) / count)).long().clamp(max=len(bank) - 1).to(items.device)
    items = items[sample] if isinstance(bank, SafeBank) else bank.gather_rows(items, sample)
    rank = math.ceil(page * count)
    found = [nearest_safe(part, items, rank, backend=backend, check=False) for part in query.split(_QUERIES)]
    return torch.cat([neighbors.scores[:, -1] for neighbors in found]).to(query.dtype)


def _guard(bank: Bank, query: Tensor, limit: Tensor) -> Guard:
    """The guard of queries [Q, d] and their limits [Q], which this rank holds, over the same ranks as the bank."""
    lowest, highest = _extremes(bank, limit)
    shift, reach = (highest + lowest) / 2, TILT * (highest - lowest) / 2
    length = (1 + reach.square()).sqrt()
    tilted = TILT * (limit - shift).unsqueeze(1)
    pad = (reach**2 - tilted.square()).clamp(min=0).sqrt()
    extra = torch.cat([-tilted.expand(-1, PARTS), pad.expand(-1, PARTS)], dim=1) / math.sqrt(PARTS)
    searched = torch.cat([query, extra], dim=1) / length
    limit = limit.clamp(-1, 1).unsqueeze(1)
    hinged = torch.cat([query, -limit, (1 - limit.square()).sqrt()], dim=1) / math.sqrt(2)
    own = SafeBank.from_unit(searched, hinged, {}).pack()
    rows: Bank = own
    if isinstance(bank, ShardedBank):
        own.offset = bank.shard.offset
        rows = ShardedBank(own, bank.ranks, len(bank), bank.device)
    return Guard(rows, (length * math.hypot(1, 1 / TILT)).to(bank.device), shift.to(bank.device))


def _extremes(bank: Bank, limit: Tensor) -> tuple[Tensor, Tensor]:
    """The smallest and the largest limit of all ranks, as scalars where the limits are."""
    lowest, highest = limit.min(), limit.max()
    if isinstance(bank, ShardedBank) and bank.ranks.world > 1:
        every = bank.ranks.stack(torch.stack([lowest, highest]).cpu()).to(limit.device)
        lowest, highest = every[:, 0].min(), every[:, 1].max()
    return lowest, highest
