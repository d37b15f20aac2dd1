"""Quadruplets in the JSON layout of ViSU (Safe-CLIP, ECCV 2024, arXiv 2311.16254) with COCO images.

The file is an object of entries keyed by number, the same under "data" beside "info", or a list of entries
with "incremental_id". An entry holds "safe" and "nsfw" (captions), "coco_id" (the safe image) and, where
unsafe images have been made, "nsfw_im_path". The public release (ViSU-Text) has no unsafe images: generate
them and name them by entry, `unsafe_image="{id}.jpg"`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .errors import DataError, ErrorPolicy
from .images import ImageError, ImageFile, ImageRef, resolve_inside
from .quadruplets import Quadruplet
from .rows import LABELS, add_row

COCO_FOLDERS = ("train2017", "val2017", "test2017", "")


def read_visu(
    path: str | os.PathLike,
    policy: ErrorPolicy,
    coco_root: str | os.PathLike,
    unsafe_root: str | os.PathLike | None = None,
    unsafe_image: str | None = None,
    allow_absolute: bool = False,
) -> list[Quadruplet]:
    """Read a ViSU JSON file.

    coco_root: folder with COCO 2017's train2017/, val2017/ and test2017/ (or the images themselves).
    unsafe_root: folder of the unsafe images (default: the JSON file's). unsafe_image: their name in it, where
    entries have no "nsfw_im_path"; {id} and {coco_id} stand for the entry's numbers. Paths may not leave
    their folder; `allow_absolute` admits absolute "nsfw_im_path"s.

    Bad entries go to `policy`. Raises DataError for a file that is not of this layout at all.
    """
    path = Path(path)
    unsafe_root = str(unsafe_root or path.parent)

    def find_image(field: str, value: Any) -> ImageRef:
        if field == "safe_image":
            return ImageFile(_coco_image(str(coco_root), value))
        return ImageFile(resolve_inside(unsafe_root, value, allow_absolute))

    records: list[Quadruplet] = []
    for row, (key, entry) in enumerate(_entries(path), start=1):
        if not isinstance(entry, dict):
            policy.summary.read += 1
            policy.bad("bad row", str(path), row, f"entry {key!r} must be an object, not {type(entry).__name__}")
            continue
        unsafe = entry.get("nsfw_im_path")
        if unsafe is None and unsafe_image:
            unsafe = unsafe_image.replace("{id}", str(key)).replace("{coco_id}", str(entry.get("coco_id")))
        fields = {
            "safe_image": entry.get("coco_id"),
            "unsafe_image": unsafe,
            "safe_text": entry.get("safe"),
            "unsafe_text": entry.get("nsfw"),
            **{label: entry.get(label) for label in LABELS},
        }
        add_row(records, fields, find_image, str(path), int(key) if str(key).isdecimal() else row, policy)
    return records


def _entries(path: Path) -> Iterator[tuple[Any, Any]]:
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not JSON: {error}") from error
    if isinstance(content, dict) and isinstance(content.get("data"), (dict, list)):
        content = content["data"]
    if isinstance(content, dict):
        yield from content.items()
    elif isinstance(content, list):
        for position, entry in enumerate(content):
            yield (entry.get("incremental_id", position) if isinstance(entry, dict) else position), entry
    else:
        raise DataError(f"{path} must hold an object or a list of ViSU entries, not {type(content).__name__}")


def _coco_image(root: str, coco_id: Any) -> str:
    if not str(coco_id).isdecimal() or len(str(coco_id)) > 12:
        raise ImageError(f"coco_id must be a whole number of at most 12 digits, not {coco_id!r:.80}", "bad path")
    name = f"{int(coco_id):012d}.jpg"
    for folder in COCO_FOLDERS:
        path = Path(root, folder, name)
        if path.is_file():
            return str(path)
    raise ImageError(
        f"missing image: {name} is not in train2017, val2017 or test2017 under {root!r}",
        "missing image",
    )
