"""The rank guard: no redirected row among the first K results of any safe query (ours).

A redirected text u gets in the way of a safe image x_j (a query) where it scores above the K-th best safe text of that
query. With limit_j the score of that K-th best text, the guard is

    rank_text(u) = (1 / k) sum_j max(0, m + u . x_j - limit_j)

over the k queries of the whole bank that u violates most, found in every step: the largest u . x_j - limit_j. Texts and
images change roles for rank_image.

That search is `nearest_safe` over unit rows g_j = [x_j, -limit_j, sqrt(1 - limit_j^2)] / sqrt(2), asked for
[u, 1, 0] / sqrt(2), since their product is (u . x_j - limit_j) / 2: exact, in every backend, and over ranks.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..bank import Bank, SafeBank, ShardedBank
from ..ops import HingeOutput, nearest_safe, neighbor_hinge
from ..ops.backends import MAX_NATIVE_K
from .common import unit

_QUERIES = 1 << 14  # searched at a time


class RankGuards(NamedTuple):
    """The safe queries that redirected rows must keep away from, as rows g_j [N, d + 2] to search in."""

    of_text: Bank  # images as queries, and the limits of their texts
    of_image: Bank  # texts as queries, and the limits of their images


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
    return RankGuards(*(_spread(bank, _guard_rows(q, _limits(bank, q, items, page, backend))) for q, items in pairs))


def rank_guard(
    x: Tensor, guard: Bank, k: int, margin: float, row_weights: Tensor, *, backend: str = "auto"
) -> HingeOutput:
    """values_i = (1 / k) sum_j max(0, margin + u_i . q_j - limit_j) over the k queries that u_i violates most.

    Args:
        x: [B, d] of any scale, u = x/|x|; the loss is differentiable in it. The queries are found without gradient.
        guard: rows g_j [N, d + 2]. Every rank of a ShardedBank calls this function.
        k, margin: see above; fewer than k rows are fewer hinges, divided by k all the same.
        row_weights: [B] what each row's value counts in the loss.
        backend: of the search and the hinge.

    Returns:
        `HingeOutput(loss, values)`: sum_i row_weights_i values_i, and the values [B].
    """
    query = F.pad(F.pad(unit(x.detach()), (0, 1), value=1.0), (0, 1)) / math.sqrt(2)
    found = guard.nearest(query, min(k, len(guard)), backend=backend, check=False)
    near, found = guard.gather(found)
    return neighbor_hinge(x, near.text, found, row_weights, margin=margin, k=k, backend=backend)


def _limits(bank: Bank, query: Tensor, items: Tensor, page: float, backend: str) -> Tensor:
    """[Q] the score of each query at rank page N among all items of the bank.

    query, items: [Q, d] rows that this rank holds, of one modality and of the other.
    """
    count = min(len(bank), math.floor(MAX_NATIVE_K / page))  # in so large a sample the kernels' largest k is that rank
    sample = torch.linspace(0, len(bank) - 1, count, dtype=torch.float64, device=items.device).long()
    items = items[sample] if isinstance(bank, SafeBank) else bank.gather_rows(items, sample)
    rank = math.ceil(page * count)
    found = [nearest_safe(part, items, rank, backend=backend, check=False) for part in query.split(_QUERIES)]
    return torch.cat([neighbors.scores[:, -1] for neighbors in found]).to(query.dtype)


def _guard_rows(query: Tensor, limit: Tensor) -> Tensor:
    limit = limit.clamp(-1, 1).unsqueeze(1)
    return torch.cat([query, -limit, (1 - limit.square()).sqrt()], dim=1) / math.sqrt(2)


def _spread(bank: Bank, rows: Tensor) -> Bank:
    """The guard rows, spread over ranks as the bank is."""
    guard = SafeBank.from_unit(rows, rows[:, :0], {})
    if not isinstance(bank, ShardedBank):
        return guard.pack()
    guard.offset = bank.shard.offset
    return ShardedBank(guard.pack(), bank.ranks, len(bank), bank.device)
