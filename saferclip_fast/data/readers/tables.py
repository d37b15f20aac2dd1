"""Quadruplets from tables: CSV, TSV, JSON Lines, Parquet and what `datasets` saved, one row a sample."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ..errors import DataError, ErrorPolicy
from ..places import table_suffix
from ..quadruplets import Quadruplet
from .columnar import read_columnar, schema_of
from .csv_rows import read_csv
from .json_text import parse_json
from .rows import REQUIRED, add_row, column_names, files_under
from .unpacked import limited_lines, unpacked

Row = tuple[int, "dict[str, Any] | str"]  # number, and fields or why the row cannot be parsed


def read_table(
    path: str | os.PathLike,
    policy: ErrorPolicy,
    root: str | os.PathLike | None = None,
    columns: Mapping[str, str] | None = None,
    allow_absolute: bool = False,
    cache_dir: str | os.PathLike | None = None,
    text_only: bool = False,
) -> list[Quadruplet]:
    """Read a .csv, .tsv, .jsonl or .ndjson file, compressed or not, a .parquet file or an .arrow file of `datasets`.

    columns: field -> column name, where it differs from safe_image, unsafe_image, safe_text, unsafe_text,
    unsafe_text_label, unsafe_image_label (the last two are optional, default 1). Image paths are relative to
    `root` (default: the file's folder) and may not leave it; `allow_absolute` admits absolute ones. cache_dir: where
    images that lie inside a .parquet file are copied to. text_only: leave unsafe images and their labels alone.

    Bad rows go to `policy`. Raises DataError for a file that cannot be read at all or lacks a column.
    """
    path = Path(path)
    names = column_names(columns, text_only)
    find_image = files_under(str(root or path.parent), allow_absolute)
    records: list[Quadruplet] = []
    try:
        for row, values in read_rows(path, names, cache_dir):
            if isinstance(values, str):
                policy.summary.read += 1
                policy.bad("bad row", str(path), row, values)
                continue
            fields = {field: values.get(name) for field, name in names.items()}
            add_row(records, fields, find_image, str(path), row, policy)
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from error
    return records


def read_rows(path: Path, names: Mapping[str, str], cache_dir: str | os.PathLike | None = None) -> Iterator[Row]:
    """Each row of a table: its number, and its values by column or why it cannot be read."""
    suffix = table_suffix(path)
    if suffix in READERS:
        return READERS[suffix](path, names)
    return _read_columnar(path, names, cache_dir)


def check_columns(path: Path | str, found: Iterable[str], names: Mapping[str, str]) -> None:
    """Raises DataError, with the columns that are there, where one that is needed or named is not `found` in `path`."""
    found = list(found)
    missing = [names[field] for field in REQUIRED if field in names and names[field] not in found]
    missing += [name for field, name in names.items() if field not in REQUIRED and name not in (field, *found)]
    if missing:
        without = "; or go without unsafe images, data.text_only=true" if missing == [names.get("unsafe_image")] else ""
        raise DataError(
            f"{path} has no column {', '.join(map(repr, missing))}; its columns are {found}. "
            f'Name them: columns={{"{REQUIRED[0]}": "..."}}, or in a command data.columns=[{REQUIRED[0]}=...] '
            f"(label_images: --column {REQUIRED[0]}=...){without}"
        )


def _read_csv(path: Path, names: Mapping[str, str]) -> Iterator[Row]:
    records = read_csv(path, [names[field] for field in REQUIRED if field in names])
    _, header = next(records)
    check_columns(path, header, names)
    for line, cells in records:
        yield line, cells if isinstance(cells, str) else dict(zip(header, cells, strict=True))


def _read_jsonl(path: Path, names: Mapping[str, str]) -> Iterator[Row]:
    renamed, seen, line = {name for field, name in names.items() if name != field}, set[str](), 0
    with unpacked(path) as file:
        for line, raw in enumerate(limited_lines(file, path), start=1):
            if not raw.strip():
                continue
            try:
                values = parse_json(raw.decode())
            except (ValueError, RecursionError) as error:
                yield line, f"not JSON: {error}"
                continue
            if isinstance(values, dict):
                seen |= values.keys() & renamed
                yield line, values
            else:
                yield line, f"must be a JSON object, not {type(values).__name__}"
    if line and (never := sorted(renamed - seen)):
        raise DataError(f"{path} has no {', '.join(map(repr, never))} in any line, which columns names")


def _read_columnar(path: Path, names: Mapping[str, str], cache_dir: str | os.PathLike | None) -> Iterator[Row]:
    there = schema_of(path).names
    check_columns(path, there, names)
    yield from read_columnar(path, names, [name for name in names.values() if name in there], cache_dir)


READERS = {
    ".csv": _read_csv,
    ".tsv": _read_csv,
    ".jsonl": _read_jsonl,
    ".ndjson": _read_jsonl,
}
