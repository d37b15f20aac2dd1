"""Models, held-out quadruplets and sets of images, as the words of the command line name them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch

from ..config import Config, ConfigError, Given, load_config, pairs
from ..data import DataError, QuadrupletDataset
from ..data.errors import ErrorPolicy
from ..models import ClipModel
from ..sources import is_run
from ..train.dataset import open_data, split_rows
from ..train.run_folder import read_run_config
from .places import NAMED
from .task import CaptionBank

T = TypeVar("T")


def read_config(model: str, given: Given) -> Config:
    """The options of the run that `model` names, or the defaults, with the data.* options that are `given` over them.

    Raises ConfigError for options that are none of data.*, and for a run of another version.
    """
    for word in [key for key, _ in pairs(given)] if isinstance(given, Mapping) else given:
        if not word.startswith("data."):
            raise ConfigError(f"{word!r}: only data.* options (as in training) are taken here; for the rest see --help")
    return read_run_config(model, given) if is_run(model) else load_config(None, given)


class HeldOut(NamedTuple):
    """Quadruplets to measure on, and their captions as a bank for images."""

    quadruplets: QuadrupletDataset
    captions: CaptionBank


def open_held_out(config: Config, clip: ClipModel) -> HeldOut | None:
    """Validation quadruplets: data.val, else the rows that training held out of data.train; None where there are none.

    The caption bank is of their safe and unsafe captions.
    """
    options = config.data
    if options.val:
        dataset = open_data(config, options.val, clip)
    elif options.train and options.val_fraction:
        dataset = open_data(config, options.train, clip)
        held_out = split_rows(len(dataset), options.val_fraction, config.seed)[1].tolist()
        if not held_out:
            raise DataError(f"{options.train} has too few rows to hold any out: name others with --data SOURCE")
        policy = ErrorPolicy(options.on_error, f"{options.train}, held-out {options.val_fraction:.3g}")
        policy.summary.read = len(held_out)
        dataset = QuadrupletDataset(
            [dataset.records[row] for row in held_out], clip.preprocess, policy, options.max_pixels, dataset.text_only
        )
    else:
        return None
    records = [dataset.records[row] for row in range(len(dataset))]
    texts = [record.safe_text for record in records] + [record.unsafe_text for record in records]
    unsafe = [False] * len(records) + [record.text_is_unsafe for record in records]
    return HeldOut(dataset, CaptionBank(texts, torch.tensor(unsafe)))


def named(words: Iterable[str], flag: str, read: Callable[[str, str | None], T]) -> dict[str, T]:
    """ "SOURCE" or "NAME=SOURCE" -> what `read(source, name or None)` makes of it, by its `name` or the given one.

    Raises ConfigError for two of one name.
    """
    found: dict[str, T] = {}
    for word in words:
        match = None if Path(word).exists() else NAMED.fullmatch(word)
        name, source = match.groups() if match else (None, word)
        value = read(source, name)
        name = name or getattr(value, "name", None) or Path(source).resolve().name
        if name in found:
            raise ConfigError(f"two of {flag} are called {name!r}: name them, {flag} NAME=SOURCE")
        found[name] = value
    return found
