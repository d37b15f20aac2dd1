"""The rank guard: no redirected row among the first K results of any safe query (ours).

A redirected text u gets in the way of a safe image x_j (a query) where it scores above the K-th best safe text of that
query. With limit_j the score of that K-th best text, but at most the score of the query's own text, the guard is

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
from ..ops import nearest_safe
from ..ops.backends import MAX_NATIVE_K

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
    pairs = ((whole.image, whole.text), (whole.text, whole.image))
    return RankGuards(*(_spread(bank, _guard_rows(q, _limits(bank, q, items, page, backend))) for q, items in pairs))


def rank_guard(x: Tensor, guard: Bank, k: int, margin: float, *, backend: str = "auto") -> Tensor:
    """[B] (1 / k) sum_j max(0, margin + x_i . q_j - limit_j) over the k queries that unit row x_i [B, d] violates most.

    Differentiable in `x`; the queries are found without gradient. Every rank of a ShardedBank calls it.
    """
    query = F.pad(F.pad(x, (0, 1), value=1.0), (0, 1)) / math.sqrt(2)
    found = guard.nearest(query.detach(), min(k, len(guard)), backend=backend, check=False)
    near, found = guard.gather(found)
    with torch.no_grad():  # linear in the query where the hinge is open: one [B, d + 2] sum is all that autograd keeps
        slope, is_open = torch.zeros_like(query), 2 * found.scores + margin > 0
        for index, weight in zip(found.indices.unbind(1), is_open.to(x.dtype).unbind(1), strict=True):
            slope += weight.unsqueeze(1) * near.text[index].to(x.dtype)
    return (2 * (query * slope).sum(-1) + margin * is_open.sum(1)) / k


def _limits(bank: Bank, query: Tensor, own: Tensor, page: float, backend: str) -> Tensor:
    """[Q] the score of each query at rank page N among all items of the bank, at most that of its own item.

    query, own: [Q, d] rows that this rank holds, and the items that belong to them.
    """
    count = min(len(bank), math.floor(MAX_NATIVE_K / page))  # in so large a sample the kernels' largest k is that rank
    sample = torch.linspace(0, len(bank) - 1, count, dtype=torch.float64, device=own.device).long()
    items = own[sample] if isinstance(bank, SafeBank) else bank.gather_rows(own, sample)
    rank = math.ceil(page * count)
    found = [nearest_safe(part, items, rank, backend=backend, check=False) for part in query.split(_QUERIES)]
    return torch.minimum(
        (query * own).sum(-1), torch.cat([neighbors.scores[:, -1] for neighbors in found]).to(query.dtype)
    )


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
