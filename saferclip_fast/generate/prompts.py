"""Prompts from a file: one a line, or a table as I2P has it (prompt, categories, sd_seed)."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ..data.errors import DataError
from ..data.places import table_suffix
from ..data.readers.csv_rows import read_csv
from ..data.readers.tables import read_rows
from .places import check_prompts

CATEGORY = ("category", "categories")  # columns; several categories are separated by commas
SEED = ("seed", "sd_seed")


class Prompt(NamedTuple):
    """One prompt, what it is about, and the seed of its first image."""

    text: str
    categories: tuple[str, ...] = ()
    seed: int | None = None


def read_prompts(source: str | os.PathLike | Sequence[str | Prompt]) -> list[Prompt]:
    """Prompts from a .txt file (one a line), a .csv, .tsv, .jsonl or .ndjson table, or from memory.

    A table has a column `prompt`, and may have `category` or `categories` ("hate, violence", or a list in JSON) and
    `seed` or `sd_seed`. Other columns, and empty lines, are left out.

    Raises DataError, naming file and row, for a row that cannot be read; FileNotFoundError or ValueError as
    check_prompts.
    """
    if not isinstance(source, (str, os.PathLike)):
        prompts = [Prompt(item) if isinstance(item, str) else item for item in source]
        if not prompts or not all(prompt.text.strip() for prompt in prompts):
            raise DataError("prompts: there is none, or one is empty")
        return prompts
    path = Path(source)
    check_prompts(path)
    prompts = list(_lines(path) if path.suffix.lower() == ".txt" else _table(path))
    if not prompts:
        raise DataError(f"{path} holds no prompt")
    return prompts


def hash_prompts(prompts: Sequence[Prompt]) -> str:
    """SHA-256 of the texts and seeds, which the images depend on."""
    return hashlib.sha256(json.dumps([(prompt.text, prompt.seed) for prompt in prompts]).encode()).hexdigest()


def _lines(path: Path) -> Iterator[Prompt]:
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is no UTF-8 text: save it as UTF-8") from error
    yield from (Prompt(line.strip()) for line in lines if line.strip())


def _table(path: Path) -> Iterator[Prompt]:
    for number, row in _rows(path):
        if isinstance(row, str):
            raise DataError(f"{path}, row {number}: {row}")
        text = row.get("prompt")
        if not isinstance(text, str) or not text.strip():
            raise DataError(f"{path}, row {number}: the prompt is empty or not text")
        yield Prompt(text.strip(), _categories(row, f"{path}, row {number}"), _seed(row, f"{path}, row {number}"))


def _rows(path: Path) -> Iterator[tuple[int, Mapping[str, Any] | str]]:
    if table_suffix(path) not in (".csv", ".tsv"):
        yield from read_rows(path, {})
        return
    records = read_csv(path, ["prompt"])
    _, header = next(records)
    if "prompt" not in header:
        raise DataError(f"{path} has no column 'prompt'; its columns are {list(header)}")
    for line, cells in records:
        yield line, cells if isinstance(cells, str) else dict(zip(header, cells, strict=True))


def _categories(row: Mapping[str, Any], place: str) -> tuple[str, ...]:
    value = next((row[name] for name in CATEGORY if row.get(name)), "")
    parts = value.split(",") if isinstance(value, str) else value
    if not isinstance(parts, list) or not all(isinstance(part, str) for part in parts):
        raise DataError(
            f"{place}: categories are text, with commas between them, or a list of texts, not {value!r:.60}"
        )
    return tuple(dict.fromkeys(part.strip() for part in parts if part.strip()))


def _seed(row: Mapping[str, Any], place: str) -> int | None:
    value = next((row[name] for name in SEED if row.get(name) not in (None, "")), None)
    if value is None:
        return None
    whole = isinstance(value, int | str) or (isinstance(value, float) and value.is_integer())
    try:
        if isinstance(value, bool) or not whole:
            raise ValueError
        seed = int(value)
    except ValueError as error:
        raise DataError(f"{place}: the seed {value!r:.40} is no whole number") from error
    if not 0 <= seed < 1 << 63:
        raise DataError(f"{place}: the seed {value!r:.40} is not from 0 to 2^63 - 1")
    return seed
