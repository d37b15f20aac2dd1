"""The data sets that a run's options name, and which rows of them are held out."""

from __future__ import annotations

import torch
from torch import Tensor

from ..config import Config, ConfigError
from ..data import QuadrupletDataset, open_quadruplets
from ..models import ClipModel
from ..runtime.ranks import Ranks


def open_data(
    config: Config,
    source: str,
    clip: ClipModel,
    ranks: Ranks = Ranks(),  # noqa: B008 - it is immutable
) -> QuadrupletDataset:
    """The data set at `source` with the model's preprocessing, bad rows handled as data.on_error says.

    Every image is decoded once; the outcome is kept in `data.cache_dir`, so a resumed run starts at once.
    """
    options = config.data
    columns = columns_of(config)
    with ranks.first_goes_ahead():
        dataset = open_quadruplets(
            source,
            transform=clip.preprocess,
            on_error=options.on_error,
            root=options.root or None,
            columns=columns or None,
            allow_absolute=options.allow_absolute,
            unsafe_root=options.unsafe_root or None,
            unsafe_image=options.unsafe_image or None,
            text_only=options.text_only,
            max_pixels=options.max_pixels,
            verify=True,
            cache_dir=options.cache_dir,
            progress=config.log.progress and ranks.first,
        )
    if ranks.first:
        print(dataset.summary, flush=True)
    return dataset


def columns_of(config: Config) -> dict[str, str]:
    """data.columns as field -> column name. Raises ConfigError."""
    words = config.data.columns
    columns = {field: name for field, _, name in (word.partition("=") for word in words)}
    if "" in columns.values() or len(columns) < len(words):
        raise ConfigError(f"data.columns={words}: write field=column, each field once, e.g. [safe_text=caption]")
    return columns


def split_rows(samples: int, fraction: float, seed: int) -> tuple[Tensor, Tensor]:
    """Rows to train on and rows held out, each in order; the same for the same seed."""
    order = torch.randperm(samples, generator=torch.Generator().manual_seed(seed))
    held_out = round(samples * fraction)
    return order[held_out:].sort().values, order[:held_out].sort().values
