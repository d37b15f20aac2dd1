"""Quadruplets from tables: CSV, TSV, JSON Lines and Parquet, one row a sample."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ..errors import DataError, ErrorPolicy
from ..quadruplets import Quadruplet
from .csv_rows import read_csv
from .json_text import parse_json
from .rows import REQUIRED, add_row, column_names, files_under

Row = tuple[int, "dict[str, Any] | str"]  # number, and fields or why the row cannot be parsed


def read_table(
    path: str | os.PathLike,
    policy: ErrorPolicy,
    root: str | os.PathLike | None = None,
    columns: Mapping[str, str] | None = None,
    allow_absolute: bool = False,
) -> list[Quadruplet]:
    """Read a .csv, .tsv, .jsonl, .ndjson or .parquet file.

    columns: field -> column name, where it differs from safe_image, unsafe_image, safe_text, unsafe_text,
    unsafe_text_label, unsafe_image_label (the last two are optional, default 1). Image paths are relative to
    `root` (default: the file's folder) and may not leave it; `allow_absolute` admits absolute ones.

    Bad rows go to `policy`. Raises DataError for a file that cannot be read at all or lacks a column.
    """
    path = Path(path)
    names = column_names(columns)
    find_image = files_under(str(root or path.parent), allow_absolute)
    records: list[Quadruplet] = []
    try:
        for row, values in READERS[path.suffix.lower()](path, names):
            if isinstance(values, str):
                policy.summary.read += 1
                policy.bad("bad row", str(path), row, values)
                continue
            fields = {field: values.get(name) for field, name in names.items()}
            add_row(records, fields, find_image, str(path), row, policy)
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from error
    return records


def check_columns(path: Path | str, found: Iterable[str], names: Mapping[str, str]) -> None:
    """Raises DataError, with the columns that are there, where one that is needed or named is not `found` in `path`."""
    found = list(found)
    missing = [names[field] for field in REQUIRED if names[field] not in found]
    missing += [name for field, name in names.items() if field not in REQUIRED and name not in (field, *found)]
    if missing:
        raise DataError(
            f"{path} has no column {', '.join(map(repr, missing))}; its columns are {found}. "
            f'Name them: columns={{"{REQUIRED[0]}": "..."}}, or in a command data.columns=[{REQUIRED[0]}=...] '
            f"(label_images: --column {REQUIRED[0]}=...)"
        )


def _read_csv(path: Path, names: Mapping[str, str]) -> Iterator[Row]:
    records = read_csv(path, [names[field] for field in REQUIRED])
    _, header = next(records)
    check_columns(path, header, names)
    for line, cells in records:
        yield line, cells if isinstance(cells, str) else dict(zip(header, cells, strict=True))


def _read_jsonl(path: Path, names: Mapping[str, str]) -> Iterator[Row]:
    renamed, seen, line = {name for field, name in names.items() if name != field}, set[str](), 0
    with path.open("rb") as file:
        for line, raw in enumerate(file, start=1):
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


def _read_parquet(path: Path, names: Mapping[str, str]) -> Iterator[Row]:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise DataError(f"reading {path} needs pyarrow: pip install pyarrow") from error
    try:
        with pq.ParquetFile(path) as file:
            check_columns(path, file.schema_arrow.names, names)
            _check_paths(path, file.schema_arrow, names)
            wanted = [name for name in names.values() if name in file.schema_arrow.names]
            row = 0
            for batch in file.iter_batches(columns=wanted):
                for values in batch.to_pylist():
                    row += 1
                    yield row, values
    except (pa.ArrowException, UnicodeDecodeError) as error:
        raise DataError(f"{path} is not a readable Parquet file: {error}") from error


def _check_paths(path: Path, schema: Any, names: Mapping[str, str]) -> None:
    """Refuses columns of images themselves, as the package `datasets` writes them, once for the whole file."""
    for name in (names["safe_image"], names["unsafe_image"]):
        kind = schema.field(name).type
        if not str(kind).startswith(("string", "large_string", "dictionary", "null")):
            raise DataError(
                f"{path}: column {name!r} holds {kind!s:.60}, not paths of images: write the images to files, or "
                "all of it to shards (data.write_shards)"
            )


READERS = {
    ".csv": _read_csv,
    ".tsv": _read_csv,
    ".jsonl": _read_jsonl,
    ".ndjson": _read_jsonl,
    ".parquet": _read_parquet,
}
