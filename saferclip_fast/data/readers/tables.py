"""Quadruplets from tables: CSV, TSV, JSON Lines and Parquet, one row a sample."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ..errors import DataError, ErrorPolicy
from ..quadruplets import Quadruplet
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


def _check_columns(path: Path, found: Iterable[str], names: Mapping[str, str]) -> None:
    found = list(found)
    missing = [names[field] for field in REQUIRED if names[field] not in found]
    if missing:
        raise DataError(
            f"{path} has no column {', '.join(map(repr, missing))}; its columns are {found}. "
            f'Name them: columns={{"{REQUIRED[0]}": "..."}}, or in a command data.columns=[{REQUIRED[0]}=...] '
            f"(label_images: --column {REQUIRED[0]}=...)"
        )


def _read_csv(path: Path, names: Mapping[str, str]) -> Iterator[Row]:
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    # Bytes that are not UTF-8 become lone surrogates, which the caption check then reports with the row.
    with path.open(newline="", encoding="utf-8-sig", errors="surrogateescape") as file:
        reader = csv.reader(file, delimiter=delimiter, strict=True)
        try:
            header = next(reader)
        except StopIteration:
            raise DataError(f"{path} is empty: a header line is needed") from None
        except csv.Error as error:
            raise DataError(f"{path}, row 1: bad header: {error}") from error
        _check_columns(path, header, names)
        while True:
            line = reader.line_num + 1
            try:
                cells = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                yield line, str(error)
                continue
            if not cells:
                continue  # an empty line
            if len(cells) != len(header):
                yield line, f"has {len(cells)} cells where the header has {len(header)}"
            else:
                yield line, dict(zip(header, cells, strict=True))


def _read_jsonl(path: Path, names: Mapping[str, str]) -> Iterator[Row]:
    with path.open("rb") as file:
        for line, raw in enumerate(file, start=1):
            if not raw.strip():
                continue
            try:
                values = json.loads(raw.decode("utf-8-sig" if line == 1 else "utf-8"))
            except (ValueError, RecursionError) as error:
                yield line, f"not JSON: {error}"
                continue
            if isinstance(values, dict):
                yield line, values
            else:
                yield line, f"must be a JSON object, not {type(values).__name__}"


def _read_parquet(path: Path, names: Mapping[str, str]) -> Iterator[Row]:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise DataError(f"reading {path} needs pyarrow: pip install pyarrow") from error
    try:
        with pq.ParquetFile(path) as file:
            _check_columns(path, file.schema_arrow.names, names)
            wanted = [name for name in names.values() if name in file.schema_arrow.names]
            row = 0
            for batch in file.iter_batches(columns=wanted):
                for values in batch.to_pylist():
                    row += 1
                    yield row, values
    except (pa.ArrowException, UnicodeDecodeError) as error:
        raise DataError(f"{path} is not a readable Parquet file: {error}") from error


READERS = {
    ".csv": _read_csv,
    ".tsv": _read_csv,
    ".jsonl": _read_jsonl,
    ".ndjson": _read_jsonl,
    ".parquet": _read_parquet,
}
