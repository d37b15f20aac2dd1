"""The processes that train together under torchrun: which one this is, its share of the work, what they exchange.

Without torchrun there is one process, and every exchange gives back what it was given.
"""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import UserError

# A rank that died is noticed at once (its connections close, and torchrun ends the others); this bounds the wait for
# one that hangs before training, whose own bound is Ranks.give_up_after. It has to outlast what one rank does alone:
# decoding a data set once to find broken images, or waiting for another run that fills the same cache.
TIMEOUT = timedelta(hours=2)
_set_timeout = getattr(dist, "set_timeout", None) or dist.distributed_c10d._set_pg_timeout  # public from torch 2.14 on
# Words in gloo's and NCCL's errors when another process is gone; these errors have no class of their own.
LOST_WORDS = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "gloo", "NCCL")


class LostRankError(UserError, RuntimeError):
    """Another process of the run ended or stopped answering."""


def split(count: int, rank: int, world: int) -> range:
    """The part of `count` rows that belongs to `rank`: contiguous, in order of rank, sizes within one row."""
    return range(count * rank // world, count * (rank + 1) // world)


@dataclass(frozen=True)
class Ranks:
    """The processes of a run, and which of them this is."""

    rank: int = 0
    world: int = 1

    @property
    def first(self) -> bool:
        """Whether this is the process that writes logs, checkpoints and exports."""
        return self.rank == 0

    def split(self, count: int) -> range:
        """This rank's part of `count` rows."""
        return split(count, self.rank, self.world)

    def share(self, count: int) -> Share:
        """A batch of `count` rows of which each rank holds its part; needs at least one row a rank."""
        if self.world == 1:
            return ALONE
        return Share(tuple(len(split(count, rank, self.world)) for rank in range(self.world)), self.rank)

    def sum(self, value: Tensor) -> Tensor:
        """The sum over all ranks, without gradient; `value` is not changed."""
        if self.world == 1:
            return value
        total = value.detach().clone()
        dist.all_reduce(total)
        return total

    def largest(self, value: int) -> int:
        """The largest `value` of any rank. Waits for the other processes, not for a device."""
        if self.world == 1:
            return value
        tensor = torch.tensor(value)
        dist.all_reduce(tensor, dist.ReduceOp.MAX)
        return int(tensor)

    def stack(self, value: Tensor) -> Tensor:
        """The `value` of every rank, of one shape: [world, ...]."""
        if self.world == 1:
            return value.unsqueeze(0)
        values = [torch.empty_like(value) for _ in range(self.world)]
        dist.all_gather(values, value.contiguous())
        return torch.stack(values)

    def gather_rows(self, value: Tensor) -> Tensor:
        """Every rank's rows [any number, ...] in order of rank: [all, ...], without gradient."""
        if self.world == 1:
            return value
        counts = self.stack(torch.tensor(len(value))).tolist()
        return Share(tuple(counts), self.rank).gather(value.detach())

    def exchange(self, value: Tensor, send: Sequence[int], receive: Sequence[int]) -> Tensor:
        """The first send[0] rows of `value` go to rank 0, the next send[1] to rank 1, and so on.

        Returns the rows that came, in order of rank: receive[r] of them from rank r.
        """
        if self.world == 1:
            return value
        out = value.new_empty((sum(receive), *value.shape[1:]))
        dist.all_to_all_single(out, value.contiguous(), list(receive), list(send))
        return out

    def give_up_after(self, minutes: float) -> None:
        """Sets how long ranks wait for each other in an exchange, from here on, before it fails with LostRankError."""
        if self.world > 1:
            _set_timeout(timedelta(minutes=minutes))

    def wait(self) -> None:
        """Until every rank is here."""
        self.largest(0)

    @contextmanager
    def first_goes_ahead(self) -> Iterator[None]:
        """The body runs on rank 0, then on all others, which find its caches filled."""
        if not self.first:
            self.wait()
        yield
        if self.first:
            self.wait()


@dataclass(frozen=True)
class Share:
    """This rank's rows of a batch that is spread over the ranks: the first rows are on rank 0, and so on.

    A loss that is a mean over the batch's rows is computed in shares: each rank's is the sum over its own rows, divided
    by the count of all rows. The shares of all ranks add up to the loss, and their gradients to its gradient.
    """

    counts: tuple[int, ...] = ()  # rows of each rank; empty: one process holds the whole batch
    rank: int = 0
    _gathered: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict, compare=False, repr=False)

    @property
    def whole(self) -> bool:
        return len(self.counts) < 2

    @property
    def first(self) -> int:
        """The row of the batch that this rank's first one is."""
        return sum(self.counts[: self.rank])

    @property
    def fraction(self) -> float:
        """This rank's part of the rows."""
        return 1.0 if self.whole else self.counts[self.rank] / sum(self.counts)

    def sum(self, value: Tensor) -> Tensor:
        """The sum over all ranks, without gradient."""
        return value if self.whole else Ranks(self.rank, len(self.counts)).sum(value)

    def maximum(self, value: Tensor) -> Tensor:
        """The largest over all ranks, element by element, without gradient."""
        if self.whole:
            return value
        largest = value.detach().clone()
        dist.all_reduce(largest, dist.ReduceOp.MAX)
        return largest

    def gather(self, rows: Tensor) -> Tensor:
        """The batch's rows [all, ...] of which `rows` are this rank's, without gradient."""
        if self.whole:
            return rows
        rows = rows.detach()
        missing = max(self.counts) - len(rows)  # collectives want equal sizes
        padded = torch.cat([rows, rows.new_zeros((missing, *rows.shape[1:]))])
        parts = [torch.empty_like(padded) for _ in self.counts]
        dist.all_gather(parts, padded)
        return torch.cat([part[:count] for part, count in zip(parts, self.counts, strict=True)])

    def gather_once(self, rows: Tensor) -> Tensor:
        """`gather` of rows that do not change: those of one tensor travel once, however many terms read them."""
        if self.whole:
            return rows
        if id(rows) not in self._gathered:
            self._gathered[id(rows)] = rows, self.gather(rows)  # holds `rows`, so that its id is not used again
        return self._gathered[id(rows)][1]


ALONE = Share()


@contextmanager
def ranks() -> Iterator[Ranks]:
    """Joins the processes that torchrun started, for the time of the body; alone without torchrun.

    Raises LostRankError where an exchange fails because another process is gone.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        yield Ranks()
        return
    store, rank, world = next(dist.rendezvous("env://", timeout=TIMEOUT))
    join(_own_store(store, rank, world), rank, world)
    try:
        yield Ranks(dist.get_rank(), world)
    except RuntimeError as error:
        if isinstance(error, dist.DistError) or any(word in str(error) for word in LOST_WORDS):
            first_line = str(error).splitlines()[0][:200]
            raise LostRankError(
                f"rank {dist.get_rank()} of {world} lost another rank, so the run stops here; the last checkpoint is "
                f"whole: the same command with resume=auto goes on from it, torchrun --max-restarts=N by itself "
                f"({first_line})"
            ) from error
        raise
    dist.destroy_process_group()  # not after a failure, where it would wait for the process that is gone


def join(store: dist.Store, rank: int, world: int) -> None:
    """One group for both kinds of tensors: gloo carries those on the CPU, NCCL those on GPUs."""
    backends = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backends, store=store, rank=rank, world_size=world, timeout=TIMEOUT)


def _own_store(store: dist.Store, rank: int, world: int) -> dist.Store:
    """A part of torchrun's store that only the processes of this start use.

    torchrun --max-restarts keeps the store, where the ranks of the last start left their addresses: a rank that reads
    one of these before it is overwritten waits for a dead process (seen in torch 2.14, pytorch issue 135712). So the
    first rank names the start and tells each of the others, who ask under names of their own.
    """
    me = uuid.uuid4().hex
    if rank:
        store.set(f"ask/{rank}", me)
        store.wait([f"answer/{me}"])
        start = store.get(f"answer/{me}").decode()
        store.set(f"joined/{start}/{rank}", "")
        return dist.PrefixStore(start, store)
    missing = set(range(1, world))
    while missing:
        for other in missing:
            if store.check([f"ask/{other}"]):  # perhaps of an earlier start, and overwritten later
                store.set(f"answer/{store.get(f'ask/{other}').decode()}", me)
        missing = {other for other in missing if not store.check([f"joined/{me}/{other}"])}
        time.sleep(0.02)
    return dist.PrefixStore(me, store)


def local_rank() -> int:
    """Which of this machine's processes this is; its GPU has the same number."""
    return int(os.environ.get("LOCAL_RANK", "0"))
