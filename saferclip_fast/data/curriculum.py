"""Three-stage curriculum: easy samples first, then easy and medium, then all."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch.utils.data import BatchSampler, Sampler

from ..runtime.ranks import split

STAGES = (1 / 3, 2 / 3, 1.0)  # share of the samples in epoch 1, in epoch 2, and from epoch 3 on


class CurriculumSampler(Sampler[int]):
    """Yields sample indices, shuffled deterministically from (seed, epoch), starting at any offset.

    difficulty order: `similarity` [N], the cosine of each unsafe text and its safe target under the frozen
    model (SafeR-CLIP, arXiv 2511.16743, progressive curriculum), sorted descending: similar pairs are easy.
    Equal values keep index order. Epoch e (counted from 1) holds the first ceil(stages[e-1] * N) samples of
    that order; epochs past the last stage hold those of the last one. `stages=(1.0,)` turns the curriculum
    off.

    `set_epoch(epoch, start)` before each epoch; with `start` samples already seen, exactly the remaining ones
    follow in the same order, so a resumed run continues where the other stopped.

    Raises ValueError for NaN or infinite similarities, an empty set, or stages that are not in (0, 1].
    """

    def __init__(
        self,
        similarity: Sequence[float] | np.ndarray | torch.Tensor,
        seed: int = 0,
        stages: Sequence[float] = STAGES,
    ):
        values = np.asarray(
            similarity.detach().cpu().double() if isinstance(similarity, torch.Tensor) else similarity,
            np.float64,
        )
        if values.ndim != 1 or len(values) == 0:
            raise ValueError(f"similarity must be one value per sample, got shape {values.shape}")
        if not np.isfinite(values).all():
            row = int(np.flatnonzero(~np.isfinite(values))[0])
            raise ValueError(f"similarity of row {row} is {values[row]}: embeddings must be finite")
        if not stages or any(not 0 < share <= 1 for share in stages):
            raise ValueError(f"stages must be shares in (0, 1], one per epoch, not {stages!r}")
        if seed < 0:
            raise ValueError(f"seed must not be negative, got {seed}")
        self.order = np.argsort(-values, kind="stable")  # [N] indices, easiest first
        self.seed = seed
        self.stages = tuple(stages)
        self.epoch = 1
        self.start = 0

    def epoch_size(self, epoch: int) -> int:
        """Number of samples of the whole epoch (from 1; ValueError below)."""
        if epoch < 1:
            raise ValueError(f"epochs count from 1, got {epoch}")
        share = self.stages[min(epoch, len(self.stages)) - 1]
        return min(len(self.order), math.ceil(share * len(self.order) - 1e-9))  # 1/3 of 3 is 1, not 2

    def epoch_indices(self, epoch: int) -> np.ndarray:
        """int64 indices of the whole epoch in the order in which they are drawn."""
        chosen = self.order[: self.epoch_size(epoch)]
        generator = np.random.Generator(np.random.PCG64(np.random.SeedSequence([self.seed, epoch])))
        return generator.permutation(chosen)

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        """Choose the epoch (from 1) and how many of its samples to leave out because they were seen
        already. Raises ValueError for what the epoch does not have."""
        size = self.epoch_size(epoch)
        if not 0 <= start <= size:
            raise ValueError(f"start must be between 0 and the epoch's {size} samples, got {start}")
        self.epoch, self.start = epoch, start

    def __len__(self) -> int:
        return self.epoch_size(self.epoch) - self.start

    def __iter__(self) -> Iterator[int]:
        return iter(self.epoch_indices(self.epoch)[self.start :].tolist())


class RankBatches(Sampler[list[int]]):
    """One rank's part of each batch of an epoch.

    All ranks see the same order of `sampler`, cut into batches of `batch_size`, and take disjoint parts of each: the
    same batches whatever the number of ranks. A batch of n rows gives rank r those from r n / world on.
    """

    def __init__(
        self, sampler: CurriculumSampler, batch_size: int, drop_last: bool, rank: int = 0, world: int = 1
    ) -> None:
        self.batches = BatchSampler(sampler, batch_size, drop_last)
        self.rank, self.world = rank, world

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[int]]:
        for batch in self.batches:
            mine = split(len(batch), self.rank, self.world)
            yield batch[mine.start : mine.stop]
