"""Quadruplets in the JSON layouts of ViSU and NSFWCaps.

ViSU (Safe-CLIP, ECCV 2024, arXiv 2311.16254) has COCO images.

The file is an object of entries keyed by number, the same under "data" beside "info", or a list of entries
with "incremental_id". An entry holds "safe" and "nsfw" (captions), "coco_id" (the safe image) and, where
unsafe images have been made, "nsfw_im_path". The public release (ViSU-Text) has no unsafe images: generate
them and name them by entry, `unsafe_image="{id}.jpg"`.

NSFWCaps (SafeR-CLIP's test set, arXiv 2511.16743) has NoCaps images: an entry holds "caption", "nsfw_caption" and
"image_coco_url", the address that the safe image came from; its file is called as the address ends. Its public release
has no unsafe images either.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import DataError, ErrorPolicy
from ..images import ImageError, ImageFile, ImageRef, resolve_inside
from ..quadruplets import Quadruplet
from .json_text import parse_json
from .rows import LABELS, UNSAFE_IMAGE, FindImage, add_row
from .unpacked import read_all

PLACES = ("id", "coco_id", "name")  # what a pattern of unsafe images may hold, in braces
COCO_FOLDERS = ("train2017", "val2017", "test2017", "")


def read_visu(
    path: str | os.PathLike,
    policy: ErrorPolicy,
    coco_root: str | os.PathLike,
    unsafe_root: str | os.PathLike | None = None,
    unsafe_image: str | None = None,
    allow_absolute: bool = False,
    text_only: bool = False,
) -> list[Quadruplet]:
    """Read a ViSU or NSFWCaps JSON file.

    coco_root: folder with COCO 2017's train2017/, val2017/ and test2017/ (or the images themselves), or with NoCaps'
    images. unsafe_root: folder of the unsafe images (default: the JSON file's). unsafe_image: their name in it, where
    entries have no "nsfw_im_path"; {id} and {coco_id} stand for the entry's numbers, {name} for the safe image's file
    name without its suffix (NSFWCaps). Paths may not leave their folder; `allow_absolute` admits absolute
    "nsfw_im_path"s. text_only: leave unsafe images alone.

    Bad entries go to `policy`. Raises DataError for a file that is not of this layout at all.
    """
    path = Path(path)
    check_pattern(unsafe_image)
    unsafe_root = str(unsafe_root or path.parent)

    def finder(layout: Layout) -> FindImage:
        def find_image(field: str, value: Any) -> ImageRef:
            if field == "safe_image":
                return ImageFile(layout.find(str(coco_root), value))
            return ImageFile(resolve_inside(unsafe_root, value, allow_absolute))

        return find_image

    records: list[Quadruplet] = []
    found = entries(read_json(path), path)
    named = text_only or unsafe_image or any("nsfw_im_path" in entry for _, entry in found if isinstance(entry, dict))
    if found and not named:
        raise DataError(
            f"{path} has captions only, no unsafe images (nsfw_im_path): make the images, then say how they are "
            'called, unsafe_image="{id}.png" (in a command data.unsafe_image={id}.png), and where they lie, '
            "unsafe_root, or train the text encoder alone, data.text_only=true"
        )
    for row, (key, entry) in enumerate(found, start=1):
        if not isinstance(entry, dict):
            policy.summary.read += 1
            policy.bad("bad row", str(path), row, f"entry {key!r} must be an object, not {type(entry).__name__}")
            continue
        layout = _layout(entry)
        fields = {
            "safe_image": entry.get(layout.safe_image),
            "unsafe_image": unsafe_name(key, entry, unsafe_image),
            "safe_text": entry.get(layout.safe_text),
            "unsafe_text": entry.get(layout.unsafe_text),
            **{label: entry.get(label) for label in LABELS},
        }
        if text_only:
            fields = {field: value for field, value in fields.items() if field not in UNSAFE_IMAGE}
        number = int(key) if str(key).isdecimal() and len(str(key)) <= 12 else row
        add_row(records, fields, finder(layout), str(path), number, policy)
    return records


def read_json(path: Path) -> Any:
    """A JSON file's content. Raises DataError, naming the file, where it cannot be read."""
    try:
        return parse_json(read_all(path))
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not JSON: {error}") from error


def entries(content: Any, path: Path) -> list[tuple[Any, Any]]:
    """(number, entry) of all entries in the content of the file `path`. Raises DataError for another layout."""
    if isinstance(content, dict) and isinstance(content.get("data"), (dict, list)):
        content = content["data"]
    if isinstance(content, dict):
        return list(content.items())
    if not isinstance(content, list):
        raise DataError(
            f"{path} must hold an object or a list of entries of ViSU or NSFWCaps, not {type(content).__name__}"
        )
    found = [
        (entry.get("incremental_id", position) if isinstance(entry, dict) else position, entry)
        for position, entry in enumerate(content)
    ]
    twice = [key for key, count in Counter(str(key) for key, _ in found).items() if count > 1]
    if twice:
        raise DataError(f"{path}: two entries have the number {twice[0]:.80}: give each its own")
    return found


def unsafe_name(key: Any, entry: Mapping[str, Any], pattern: str | None) -> Any:
    """How the entry's unsafe image is called: by the entry itself, else by read_visu's `unsafe_image` pattern."""
    name, safe_image = entry.get("nsfw_im_path"), entry.get(_layout(entry).safe_image)
    if name is not None or not pattern:
        return name
    pattern = pattern.replace("{id}", str(key)).replace("{coco_id}", str(safe_image))
    return pattern.replace("{name}", Path(_file_name(safe_image)).stem)


def check_pattern(pattern: str | None) -> None:
    """Raises ValueError for a pattern of unsafe images that is the same for all entries or holds an unknown place."""
    names = re.findall(r"\{(\w*)\}", pattern or "")
    if pattern and (not names or set(names) - set(PLACES)):
        known = ", ".join(f"{{{name}}}" for name in PLACES)
        raise ValueError(f"unsafe_image={pattern!r} must tell entries apart by {known}, e.g. {{id}}.png")


def _layout(entry: Mapping[str, Any]) -> Layout:
    return NSFWCAPS if NSFWCAPS.safe_image in entry else VISU


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


def _nocaps_image(root: str, url: Any) -> str:
    return resolve_inside(root, _file_name(url))


def _file_name(url: Any) -> str:
    """The part of the address after its last slash."""
    return str(url).partition("?")[0].rpartition("/")[2]


class Layout(NamedTuple):
    """How an entry calls its parts, and what finds its safe image under a root."""

    safe_image: str
    safe_text: str
    unsafe_text: str
    find: Callable[[str, Any], str]


VISU = Layout("coco_id", "safe", "nsfw", _coco_image)
NSFWCAPS = Layout("image_coco_url", "caption", "nsfw_caption", _nocaps_image)
