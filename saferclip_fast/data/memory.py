"""Quadruplets in memory (a data frame, dicts, a torch data set) written to a folder, where a run finds them again."""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from tqdm import tqdm

from ..storage.files import atomic_write
from .errors import DataError
from .images import ImageArray, ImageFile, TarMember
from .open import open_quadruplets
from .quadruplets import QuadrupletDataset
from .readers.columnar import StoredImage
from .readers.rows import LABELS, column_names
from .readers.tables import check_columns

IMAGES = ("safe_image", "unsafe_image")
_PNG_MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "I", "I;16")
PATHS, PIXELS = "a path", "an image in memory"


class Kept(NamedTuple):
    """What open_quadruplets takes for data that was in memory."""

    source: str  # a JSON Lines table
    root: str  # of its images; empty: they lie beside it


def keep(
    data: Any,
    folder: str | os.PathLike,
    columns: Mapping[str, str] | None = None,
    root: str = "",
    progress: bool = True,
    text_only: bool = False,
) -> Kept:
    """Write `data` to `folder` as a table, and its images beside it unless they are paths.

    Files are named by their content, so equal data gives equal files, and nothing that is there changes.

    Args:
        data: rows with the columns that a table has (`read_table`): a pandas DataFrame, a sequence of dicts, a
            QuadrupletDataset, or any data set with a length whose items are such dicts. An image is a path, a PIL
            image, the bytes of an image file, a uint8 array [H, W, 3] or [H, W], or a dict with "bytes", as `datasets`
            has it. All of them are paths, or none is. A missing value is None or NaN.
        folder: made where it is missing.
        columns: field -> column name, where it differs.
        root: folder that paths are relative to; empty: the current one.
        progress: show a bar.
        text_only: leave unsafe images alone.

    Raises:
        DataError: no rows, a column that is missing, an item of another kind; names the row, counted from 1.
        OSError: a file could not be written.
    """
    names, folder = column_names(columns, text_only), Path(folder)
    kind, lines, row = "", [], 0
    for row, values in enumerate(tqdm(_rows(data, names), "keep rows", _length(data), disable=not progress), 1):
        line = {name: _plain(values[name], field in LABELS) for field, name in names.items() if name in values}
        for name in (names[field] for field in IMAGES if field in names):
            if (cell := values.get(name)) is None or _is_missing(cell):
                continue
            cell = _unwrapped(cell)
            found = PATHS if isinstance(cell, str | os.PathLike) else PIXELS
            if found != (kind := kind or found):
                raise DataError(f"row {row}: {name} is {found}, and those before it are {kind}: give all as one kind")
            line[name] = os.fspath(cell) if found == PATHS else _write(folder, _encoded(cell, name, row))
        lines.append(json.dumps(line, ensure_ascii=True).encode() + b"\n")
    if not row:
        raise DataError("the data has no rows")
    text = b"".join(lines)
    file = folder / f"rows-{hashlib.sha256(text).hexdigest()[:16]}.jsonl"
    if not file.is_file():
        with atomic_write(file) as temporary:
            temporary.write_bytes(text)
    return Kept(str(file), (root or ".") if kind == PATHS else "")


def open_rows(
    data: Any,
    folder: str | os.PathLike,
    *,
    columns: Mapping[str, str] | None = None,
    root: str = "",
    progress: bool = True,
    text_only: bool = False,
    **options: Any,
) -> QuadrupletDataset:
    """A QuadrupletDataset of rows in memory: a data frame, dicts, or any data set of dicts, `content_hash` or not.

    Args:
        data, folder, columns, root, text_only: as in `keep`, which writes the rows to `folder`.
        progress: show bars.
        options: the other ones of open_quadruplets.

    Raises what `keep` and open_quadruplets raise.
    """
    kept = keep(data, folder, columns, root, progress, text_only)
    options |= {"columns": columns, "text_only": text_only, "progress": progress}
    return open_quadruplets(kept.source, root=kept.root or None, **options)


def _rows(data: Any, names: Mapping[str, str]) -> Iterator[Mapping[str, Any]]:
    """The rows, whatever holds them; the first one, or the frame, has the columns."""
    if isinstance(data, QuadrupletDataset):
        for record in data.records:
            yield {name: getattr(record, field) for field, name in names.items()}
        return
    if hasattr(data, "columns") and hasattr(data, "to_dict"):  # a DataFrame; pandas is not asked for
        check_columns("the data frame", data.columns, names)
        yield from data.to_dict("records")
        return
    if isinstance(data, str | bytes | Mapping) or not (hasattr(data, "__len__") and hasattr(data, "__getitem__")):
        raise DataError(
            f"data is a {type(data).__name__}: give a path, a DataFrame, a list of dicts, or a data set with a length "
            "whose items are dicts"
        )
    if isinstance(data, list | tuple) and data and all(isinstance(item, Mapping) for item in data):
        check_columns("the data", dict.fromkeys(key for item in data for key in item), names)
    for index in range(len(data)):  # not iter: a torch data set ends where its length says
        item = data[index]
        if not isinstance(item, Mapping):
            raise DataError(
                f"row {index + 1} is a {type(item).__name__}, not a dict with {', '.join(map(repr, names.values()))}"
            )
        if index == 0 and not isinstance(data, list | tuple):
            check_columns("the first row", item, names)
        yield item


def _length(data: Any) -> int | None:
    return len(data) if hasattr(data, "__len__") else None


def _plain(value: Any, label: bool) -> Any:
    """What JSON can hold of a text or label; of an image, nothing yet."""
    if getattr(value, "ndim", None) == 0:  # NumPy's numbers, and arrays and tensors of one
        value = value.item()
    if _is_missing(value):
        return None
    if isinstance(value, str | int | float | list):
        return value
    return str(value) if label else None  # a label of another kind is read or refused, never taken for a missing one


def _is_missing(value: Any) -> bool:
    return value is None or type(value).__name__ in ("NAType", "NaTType") or _is_nan(value)


def _is_nan(value: Any) -> bool:
    return isinstance(value, float | np.floating) and bool(value != value)


def _unwrapped(cell: Any) -> Any:
    """The bytes, else the path, of an image as `datasets` writes it."""
    if isinstance(cell, Mapping):
        return cell.get("bytes") or cell.get("path")
    return cell


def _encoded(cell: Any, name: str, row: int) -> bytes:
    """The bytes of an image file: those that are there, or PNG of the pixels."""
    if isinstance(cell, bytes | bytearray | memoryview):
        return bytes(cell)
    if isinstance(cell, ImageFile | TarMember | StoredImage):
        return cell.content()
    if isinstance(cell, ImageArray):
        cell = cell.array
    if isinstance(cell, np.ndarray) and cell.dtype == np.uint8 and cell.ndim in (2, 3) and cell.shape[2:] in ((), (3,)):
        cell = Image.fromarray(cell)
    if not isinstance(cell, Image.Image) or cell.mode == "F":
        shape = f" of {cell.dtype}, {tuple(cell.shape)}" if hasattr(cell, "dtype") and hasattr(cell, "shape") else ""
        raise DataError(
            f"row {row}: {name} is a {type(cell).__name__}{shape}: give a path, a PIL image, bytes or a uint8 array "
            "[H, W, 3], before any preprocessing (the model's own comes after)"
        )
    if cell.mode not in _PNG_MODES:
        cell = cell.convert("RGB")
    buffer = io.BytesIO()
    cell.save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def _write(folder: Path, data: bytes) -> str:
    """Writes an image under the hash of its content; its path in `folder`."""
    digest = hashlib.sha256(data).hexdigest()
    name = f"images/{digest[:2]}/{digest[2:32]}"
    file = folder / name
    if not (file.is_file() and file.stat().st_size == len(data)):
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")
        temporary.write_bytes(data)
        temporary.replace(file)  # not synced, one by one, which takes milliseconds each; a torn image is a bad row
    return name


def is_in_memory(data: Any) -> bool:
    """Whether it is no path or name of a source."""
    return not isinstance(data, str | os.PathLike)
