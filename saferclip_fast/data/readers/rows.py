"""A row's raw fields, of whatever format, to a Quadruplet."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from ..errors import ErrorPolicy
from ..images import ImageError, ImageFile, ImageRef, resolve_inside
from ..quadruplets import Quadruplet
from .columnar import StoredImage

REQUIRED = ("safe_image", "unsafe_image", "safe_text", "unsafe_text")
LABELS = ("unsafe_text_label", "unsafe_image_label")
UNSAFE_IMAGE = ("unsafe_image", "unsafe_image_label")  # what text-only quadruplets lack
FIELDS = REQUIRED + LABELS
LABEL_WORDS = {"false": 0, "safe": 0, "true": 1, "unsafe": 1}

FindImage = Callable[[str, Any], ImageRef]  # (field name, the row's value) -> where the image lies


class RowError(ValueError):
    """A row that cannot be used; `kind` is for counting."""

    def __init__(self, kind: str, message: str):
        super().__init__(message)
        self.kind = kind


def column_names(columns: Mapping[str, str] | None, text_only: bool = False) -> dict[str, str]:
    """Field -> column name: the field's own name unless `columns` renames it; text_only: without the unsafe image's."""
    columns = dict(columns or {})
    unknown = sorted(set(columns) - set(FIELDS))
    if unknown:
        raise ValueError(f"columns renames {unknown}, but the fields are {list(FIELDS)}")
    names = {field: columns.get(field, field) for field in FIELDS}
    if doubled := sorted({name for name in names.values() if list(names.values()).count(name) > 1}):
        raise ValueError(f"columns gives {', '.join(map(repr, doubled))} to two fields: {names}")
    return {field: name for field, name in names.items() if not (text_only and field in UNSAFE_IMAGE)}


def files_under(root: str, allow_absolute: bool) -> FindImage:
    """Images are files whose paths are relative to `root`, or already found inside the table."""

    def find(field: str, value: Any) -> ImageRef:
        if isinstance(value, StoredImage):
            return value
        return ImageFile(resolve_inside(root, value, allow_absolute))

    return find


def add_row(
    records: list[Quadruplet],
    fields: Mapping[str, Any],
    find_image: FindImage,
    file: str,
    row: int,
    policy: ErrorPolicy,
) -> None:
    """Append the row to `records`, or report it to `policy`. `fields` has the keys of FIELDS; None is missing.

    Without the keys of UNSAFE_IMAGE the quadruplet is text-only: its safe image stands in, labeled safe.
    """
    policy.summary.read += 1
    text_only = "unsafe_image" not in fields
    try:
        safe_image = _image(fields, "safe_image", find_image)
        records.append(
            Quadruplet(
                safe_image=safe_image,
                safe_text=_text(fields, "safe_text"),
                unsafe_image=safe_image if text_only else _image(fields, "unsafe_image", find_image),
                unsafe_text=_text(fields, "unsafe_text"),
                unsafe_text_label=_label(fields, "unsafe_text_label"),
                unsafe_image_label=0 if text_only else _label(fields, "unsafe_image_label"),
                file=file,
                row=row,
            )
        )
    except (RowError, ImageError) as error:
        policy.bad(error.kind, file, row, error)


def _image(fields: Mapping[str, Any], field: str, find_image: FindImage) -> ImageRef:
    if fields.get(field) is None or _is_nan(fields[field]):
        raise RowError("missing field", f"no {field}")
    try:
        return find_image(field, fields[field])
    except ImageError as error:
        raise RowError(error.kind, f"{field}: {error}") from error


def _text(fields: Mapping[str, Any], field: str) -> str:
    text = fields.get(field)
    if text is None or _is_nan(text):
        raise RowError("missing field", f"no {field}")
    if not isinstance(text, str):
        raise RowError("bad caption", f"{field} must be text, not {type(text).__name__}")
    text = text.removeprefix("\ufeff").strip()
    if not text:
        raise RowError("empty caption", f"{field} is empty")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RowError("bad caption", f"{field} is not valid UTF-8: {error.reason} (save the file as UTF-8)") from error
    return text


def _label(fields: Mapping[str, Any], field: str) -> float:
    value = fields.get(field)
    word = str(value).strip().lower()
    if value is None or _is_nan(value) or word in ("", "nan"):
        return 1
    if word in LABEL_WORDS:
        return LABEL_WORDS[word]
    try:
        label = float("nan" if "_" in word else word)  # "0_1", a slip of 0.1, is 1 to Python
    except ValueError:
        label = math.nan
    if not 0 <= label <= 1:
        raise RowError("bad label", f"{field} must lie between 0 (safe) and 1 (unsafe), not {value!r:.80}")
    return int(label) if label in (0, 1) else label


def _is_nan(value: Any) -> bool:
    """Whether it is how pandas writes a value that is missing."""
    return isinstance(value, float) and math.isnan(value)
