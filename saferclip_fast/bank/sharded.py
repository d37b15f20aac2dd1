"""ShardedBank: a bank too large for one device, whose rows lie on all ranks, or in a mapped file."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops import Neighbors, nearest_safe
from ..runtime.ranks import Ranks, split
from .safe_bank import SafeBank


class ShardedBank:
    """A SafeBank of N rows of which each rank holds one slice; every rank calls each method at the same time.

    With the default `ranks` there is one slice: a bank on another device than the one that trains, for example
    `ShardedBank(SafeBank.load(path), device=torch.device("cuda"))`, memory-mapped and searched on the CPU.

    Args:
        shard: this rank's slice, as `SafeBank.shard(rank, world)` cuts it, on the device that searches it.
        ranks: the processes that hold the slices.
        count: N of all slices.
        device: where queries come from and results go to; default: the shard's.

    Raises ValueError where there are more ranks than rows.
    """

    def __init__(
        self, shard: SafeBank, ranks: Ranks | None = None, count: int | None = None, device: torch.device | None = None
    ) -> None:
        self.shard, self.ranks = shard, ranks or Ranks()
        self.count = len(shard) if count is None else count
        self.device = device or shard.device
        rank, world = self.ranks.rank, self.ranks.world
        if world > self.count:
            raise ValueError(f"a bank of {self.count} rows does not spread over {world} ranks: objective.bank=resident")
        slices = [split(self.count, other, world) for other in range(world)]
        held = range(shard.offset, shard.offset + len(shard))
        if held != slices[rank]:
            raise ValueError(
                f"rank {rank} of {world} holds {held} of a bank of {self.count} rows, but its slice is {slices[rank]}; "
                "cut it with SafeBank.shard"
            )
        self.ends = torch.tensor([part.stop for part in slices], device=self.device)

    def __len__(self) -> int:
        return self.count

    def nearest(self, query: Tensor, k: int = 1, *, backend: str = "auto", check: bool = True) -> Neighbors:
        """The k rows of the whole bank nearest to each query of this rank: what `nearest_safe` gives on one device.

        Each rank searches its slice for the queries of all ranks; the best of all slices are merged, equal scores in
        favor of the lower index. Exchanged: the queries, and k scores and indices of each query from each rank.

        Args:
            query: [Q, d] on `device`, a different Q on each rank, which may be 0.
            k, backend, check: as in `nearest_safe`.

        Returns:
            `Neighbors(scores, indices)`: [Q, k] float32 and [Q, k] int64 rows of the whole bank, on `device`.

        Raises ValueError for a k out of range, and what `nearest_safe` raises.
        """
        if not 1 <= k <= self.count:
            raise ValueError(f"k={k} must lie between 1 and the bank's {self.count} rows")
        counts = self.ranks.stack(torch.tensor(len(query))).tolist()
        queries = self.ranks.gather_rows(query.detach()).to(self.shard.device)
        found = nearest_safe(queries, self.shard, min(k, len(self.shard)), backend=backend, check=check)
        missing = (0, k - found.scores.shape[1])  # a slice may have fewer than k rows
        scores = F.pad(found.scores, missing, value=-torch.inf).to(self.device)
        indices = F.pad(found.indices + self.shard.offset, missing).to(self.device)
        # slices lie in the order of their rows, so a stable sort prefers the lower index
        scores, order = self._of_my_queries(scores, counts).sort(dim=1, descending=True, stable=True)
        indices = self._of_my_queries(indices, counts).gather(1, order)
        return Neighbors(scores[:, :k].contiguous(), indices[:, :k].contiguous())

    def gather(self, neighbors: Neighbors) -> tuple[SafeBank, Neighbors]:
        """The rows that `neighbors` [B, k] names, as a small bank on `device`, and the neighbors numbered in it.

        With these two, every objective runs as with the whole bank. Exchanged: each distinct row once.
        """
        distinct, numbered = neighbors.indices.to(self.device).unique(return_inverse=True)
        owner = torch.searchsorted(self.ends, distinct, right=True)
        send = torch.bincount(owner, minlength=self.ranks.world)
        receive = self.ranks.stack(send)[:, self.ranks.rank].tolist()
        asked = self.ranks.exchange(distinct, send.tolist(), receive).to(self.shard.device)
        own = self.shard.select(asked - self.shard.offset).to(self.device)
        text, image = (self.ranks.exchange(part, receive, send.tolist()) for part in (own.text, own.image))
        bank = SafeBank.from_unit(text, image, self.shard.metadata)
        return bank, Neighbors(neighbors.scores.to(self.device), numbered)

    def gather_rows(self, own: Tensor, index: Tensor) -> Tensor:
        """Rows `index` (ascending, of the whole bank); `own` are those that belong to this rank's slice."""
        mine = index[(index >= self.shard.offset) & (index < self.shard.offset + len(self.shard))]
        return self.ranks.gather_rows(own[mine - self.shard.offset])

    def _of_my_queries(self, results: Tensor, counts: list[int]) -> Tensor:
        """[queries of all ranks, k] of this slice -> [my queries, world * k] of all slices, in order of slice."""
        mine, world, k = counts[self.ranks.rank], self.ranks.world, results.shape[1]
        parts = self.ranks.exchange(results, counts, [mine] * world)
        return parts.view(world, mine, k).transpose(0, 1).reshape(mine, world * k)
