"""What can be known of a model and data by the words that name them: checked before torch is imported."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from ..data.places import check_place
from ..models.places import check_model

NAMED = re.compile(r"([\w.-]+)=(.+)")


def check_words(model: str, frozen: str | None, data: str | None, images: Iterable[str]) -> None:
    """Raises FileNotFoundError, DataError or ValueError for what is not there. `images` may be [NAME=]SOURCE."""
    for word in filter(None, (model, frozen)):
        check_model(word)
    if data and not data.endswith(".json"):  # whose root is an option, which a run may have
        check_place(data)
    for word in images:
        source = word if Path(word).exists() or not (match := NAMED.fullmatch(word)) else match[2]
        looks_like_files = not re.match(r"\w+:", source) and not re.search(r"[*?{\[]", source)
        if looks_like_files and not Path(source).exists():
            raise FileNotFoundError(f"no such file or folder of images: {source}")
