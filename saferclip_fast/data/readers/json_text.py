"""JSON that others wrote: a name that stands twice in one object is refused, not silently the last one."""

from __future__ import annotations

import json
from typing import Any


def parse_json(text: str | bytes) -> Any:
    """The value in `text`, UTF-8, -16 or -32 where it is bytes, with or without a byte order mark.

    Raises ValueError for text that is no JSON or has a name twice in one object, RecursionError for too deep nesting.
    """
    if isinstance(text, str):
        text = text.removeprefix("\ufeff")
    return json.loads(text, object_pairs_hook=_once)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        doubled = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the name {doubled!r:.80} stands twice in one object")
    return found
