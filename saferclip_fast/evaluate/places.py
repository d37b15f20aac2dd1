"""What can be known of a model and data by the words that name them: checked before torch is imported."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from pathlib import Path

from ..data.errors import DataError
from ..data.places import check_place
from ..models.places import check_model

NAMED = re.compile(r"([\w.-]+)=(.+)")


def check_words(
    model: str, frozen: str | None, data: str | None, images: Iterable[str], caption_images: Iterable[str]
) -> None:
    """Raises FileNotFoundError, DataError or ValueError for what is not there. Images may be [NAME=]SOURCE."""
    for word in filter(None, (model, frozen)):
        check_model(word)
    if data and not data.endswith(".json"):  # whose root is an option, which a run may have
        check_place(data)
    for source in map(_source, images):
        check_images(source)
    for source in map(_source, caption_images):
        if not Path(source).is_dir():
            raise DataError(f"no such folder of images: {source}")


def check_images(source: str) -> None:
    """Raises DataError where there is nothing at the source of a zero-shot set."""
    if not re.match(r"\w+:", source) and not re.search(r"[*?{\[]", source) and not Path(source).exists():
        raise DataError(f"cannot read {source}: No such file or directory")


def check_bound(dial: bool, max_loss: float | None, confidence: float, images: Collection[str] = ("?",)) -> None:
    """Raises ValueError for a bound on the loss of accuracy that means nothing."""
    if not 0 < confidence < 1:
        raise ValueError(f"--confidence is a probability between 0 and 1, such as 0.95, got {confidence}")
    if max_loss is None:
        return
    if not dial:
        raise ValueError("--max-loss chooses a place on the safety dial: add --dial")
    if not images:
        raise ValueError("--max-loss bounds the loss of zero-shot accuracy: name sets of images with --images SOURCE")
    if not 0 <= max_loss < 1:
        raise ValueError(f"--max-loss is a part of all images, from 0 to below 1 (0.02: 2 points), got {max_loss}")


def _source(word: str) -> str:
    match = None if Path(word).exists() else NAMED.fullmatch(word)
    return match[2] if match else word
