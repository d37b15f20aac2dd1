"""Which items are right for which queries: equal pictures are one item, and so are equal captions."""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..data.images import ImageRef
from ..data.quadruplets import Quadruplet


class Contents(NamedTuple):
    """A number for each text and image of N samples, int64 [N]: equal numbers are equal contents.

    Texts are numbered together, safe and unsafe ones, and so are images.
    """

    safe_text: Tensor
    safe_image: Tensor
    unsafe_text: Tensor
    unsafe_image: Tensor

    @classmethod
    def distinct(cls, count: int) -> Contents:
        """Nothing is equal."""
        safe, unsafe = torch.arange(2 * count).split(count)
        return cls(safe, safe, unsafe, unsafe)

    @classmethod
    def of(cls, records: Sequence[Quadruplet]) -> Contents:
        """Texts are equal where their characters are, images where their stored bytes are. Reads every image."""
        texts, images = _Numbers(), _Numbers()
        rows = [
            (
                texts.of(record.safe_text),
                images.of(_digest(record.safe_image)),
                texts.of(record.unsafe_text),
                images.of(_digest(record.unsafe_image)),
            )
            for record in records
        ]
        return cls(*torch.tensor(rows, dtype=torch.int64).T)


class Right(NamedTuple):
    """Which of N items are right for which of N queries, by the number that each of them has."""

    asks: Tensor  # int64 [N], from 0
    shows: Tensor  # int64 [N], from 0
    pairs: Tensor  # int64: the numbers that belong together, as asks * size + shows
    size: int

    @classmethod
    def of(cls, asks: Tensor, shows: Tensor) -> Right:
        """A query and an item belong together where a sample holds both of their numbers."""
        size = int(shows.max()) + 1 if len(shows) else 1
        return cls(asks, shows, torch.unique(asks * size + shows), size)

    def among(self, queries: Tensor, items: Tensor) -> Tensor:
        """bool [Q, K]: whether each of the items [Q, K] is right for its query; samples [Q] and [Q, K]."""
        return torch.isin(self.asks[queries][:, None] * self.size + self.shows[items], self.pairs)

    def how_many(self, queries: Tensor, items: Tensor) -> Tensor:
        """int64 [Q]: how many of the items [G] are right for each query; samples."""
        held = torch.bincount(self.shows[items], minlength=self.size)
        asked = self.pairs // self.size
        totals = torch.zeros(int(self.asks.max()) + 1, dtype=torch.int64)
        return totals.index_add_(0, asked, held[self.pairs % self.size])[self.asks[queries]]


def first_of_each(numbers: Tensor) -> Tensor:
    """int64: the first place of every number in `numbers` [N], in order."""
    _, inverse = torch.unique(numbers, return_inverse=True)
    first = torch.full((int(inverse.max()) + 1,), len(numbers), dtype=torch.int64)
    return first.scatter_reduce_(0, inverse, torch.arange(len(numbers)), "amin").sort().values


class _Numbers(dict[Hashable, int]):
    """A number for each value, in the order in which they come."""

    def of(self, value: Hashable) -> int:
        return self.setdefault(value, len(self))


def _digest(image: ImageRef) -> bytes:
    return hashlib.sha256(image.content()).digest()
