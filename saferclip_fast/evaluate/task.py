"""The samples that a model is measured on, and how they are measured."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from ..data import QuadrupletDataset
from ..data.images import ImageRef
from ..data.labeled import LabeledImages
from .bootstrap import RESAMPLES
from .metrics import Labels
from .right_items import Contents
from .zero_shot import Template


class CaptionBank(NamedTuple):
    """Captions that real images are matched with."""

    texts: Sequence[str]
    unsafe: Tensor  # bool [M]


@dataclass
class Task:
    """The data to measure on; every part is optional.

    quadruplets: held-out samples; right: int64 [N], an item is right for a query where these agree (default: where a
    sample holds both, so that a picture with five captions is right for each of them). zero_shot: classification sets;
    templates: prompts instead of their own. images: sets of real images by name, each matched with `captions`;
    distractors: safe images that unsafe captions search together with each of these sets.
    """

    quadruplets: QuadrupletDataset | None = None
    right: Tensor | None = None
    zero_shot: Sequence[LabeledImages] = ()
    templates: Sequence[Template] | None = None
    images: Mapping[str, Sequence[ImageRef]] = field(default_factory=dict)
    captions: CaptionBank | None = None
    distractors: Sequence[ImageRef] = ()

    @functools.cached_property
    def labels(self) -> Labels:
        """Labels of the quadruplets; reads every image once."""
        assert self.quadruplets is not None
        records = self.quadruplets.records
        text, image = ([getattr(r, f"{name}_is_unsafe") for r in records] for name in ("text", "image"))
        return Labels(
            Contents.of(records),
            torch.tensor(text).long(),
            torch.tensor(image).long(),
            self.right,
            self.quadruplets.text_only,
        )


@dataclass
class Settings:
    """How to measure: batches, precision, where embeddings are cached, and the bootstrap."""

    cache_dir: str = ".cache/saferclip"
    batch_size: int = 256
    num_workers: int = 0
    precision: str = "fp32"
    resamples: int = RESAMPLES
    seed: int = 0
    examples: int = 100  # unsafe captions listed
    worst_cases: int = 20
    progress: bool = True
