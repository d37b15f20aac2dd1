"""Quadruplets in WebDataset tar shards: read with random access through an index of offsets, and written.

A sample is a run of members that share a key (the name up to its first dot): `KEY.safe_image.jpg`,
`KEY.unsafe_image.jpg` (or jpeg, png, webp) and `KEY.json` with safe_text, unsafe_text and optionally the
labels; texts may also be `KEY.safe_text.txt`, `KEY.unsafe_text.txt`. Other members are ignored: nothing is
unpickled.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ...storage.files import atomic_write
from ..errors import DataError, ErrorPolicy
from ..images import ImageArray, ImageError, ImageRef, TarMember, opened
from ..places import shard_paths
from ..quadruplets import Quadruplet, QuadrupletDataset, check_opened
from .json_text import parse_json
from .rows import REQUIRED, RowError, add_row, column_names
from .tar_index import index_tar

IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp")
IMAGES = ("safe_image", "unsafe_image")
WHAT = "a sample is a run of neighboring members with one key, the name up to its first dot"
MAX_TEXT_BYTES = 1 << 20  # captions are short; a larger member is a mistake or an attack


def read_shards(
    source: str | os.PathLike,
    policy: ErrorPolicy,
    columns: Mapping[str, str] | None = None,
    text_only: bool = False,
) -> list[Quadruplet]:
    """Index the shards that `source` names: a .tar, a folder of them, a glob, or braces
    ("s-{0000..0009}.tar").

    columns: field -> name used in members and JSON, where it differs. Bad samples go to `policy`, numbered
    from 1 in their shard. text_only: leave unsafe images alone. Raises DataError when there is no shard.
    """
    names = column_names(columns, text_only)
    records: list[Quadruplet] = []
    for path in shard_paths(source):
        row = 0
        try:
            for row, (key, members) in enumerate(shard_samples(path), start=1):
                _add_sample(records, key, members, names, path, row, policy)
        except DataError as error:
            if policy.on_error == "raise":
                raise
            policy.summary.read += 1
            policy.bad("bad shard", path, row + 1, error)
    return records


def shard_samples(path: str) -> Iterator[tuple[str, dict[str, TarMember]]]:
    """(key, extension -> member) of each run of members with one key."""
    current = ""
    members: dict[str, TarMember] = {}
    for member in index_tar(path):
        folder, _, base = member.name.rpartition("/")
        stem, dot, extension = base.partition(".")
        if not dot or not stem:
            continue
        key = f"{folder}/{stem}"
        if key != current or extension.lower() in members:  # a repeated extension starts a new sample
            if members:
                yield current, members
            current, members = key, {}
        members[extension.lower()] = member
    if members:
        yield current, members


def _add_sample(
    records: list[Quadruplet],
    key: str,
    members: dict[str, TarMember],
    names: Mapping[str, str],
    path: str,
    row: int,
    policy: ErrorPolicy,
) -> None:
    try:
        values = _json(members["json"]) if "json" in members else {}
        fields: dict[str, Any] = {}
        for field, name in names.items():
            fields[field] = values.get(name)
            if f"{name}.txt" in members:
                fields[field] = read_text(members[f"{name}.txt"])
        for field in (field for field in IMAGES if field in names):
            stored = [f"{names[field]}.{suffix}" for suffix in IMAGE_SUFFIXES]
            there = [members[name] for name in stored if name in members]
            if len(there) > 1:
                raise RowError("bad row", f"two images {', '.join(member.name for member in there)} for one {field}")
            fields[field] = there[0] if there else None
        if missing := [field for field in REQUIRED if field in names and fields[field] is None]:
            raise RowError("missing field", f"no {missing[0]} among its members {', '.join(members)}; {WHAT}")
    except (RowError, ImageError) as error:
        policy.summary.read += 1
        policy.bad(error.kind, path, row, f"sample {key!r}: {error}")
        return
    add_row(records, fields, lambda field, member: member, path, row, policy)


def read_text(member: TarMember) -> str:
    """The UTF-8 text of a member. Raises RowError where it is none or too long, ImageError where it is cut off."""
    if member.size > MAX_TEXT_BYTES:
        raise RowError("bad row", f"{member.name} has {member.size} bytes, more than {MAX_TEXT_BYTES}")
    try:
        return member.content().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise RowError("bad row", f"{member.name} is not UTF-8: {error.reason}") from error


def _json(member: TarMember) -> dict[str, Any]:
    text = read_text(member)
    try:
        values = parse_json(text)
    except (ValueError, RecursionError) as error:
        raise RowError("bad row", f"{member.name} is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise RowError("bad row", f"{member.name} must be a JSON object, not {type(values).__name__}")
    return values


def write_shards(
    dataset: QuadrupletDataset,
    folder: str | os.PathLike,
    samples_per_shard: int = 1000,
    progress: bool = True,
) -> list[str]:
    """Write `dataset` as folder/000000.tar, 000001.tar, ...; returns the paths.

    Image bytes are copied as stored, rendered images become PNG. Equal data gives equal files. Each shard
    appears under its name only when complete.

    Raises ImageError, naming an image that is broken or too large, OSError where a shard cannot be written.
    """
    import webdataset

    check_opened(dataset)
    if samples_per_shard < 1:
        raise ValueError(f"samples_per_shard must be at least 1, not {samples_per_shard}")
    Path(folder).mkdir(parents=True, exist_ok=True)
    paths: list[str] = []
    with tqdm(total=len(dataset), desc="write shards", unit="sample", disable=not progress) as bar:
        for start in range(0, len(dataset), samples_per_shard):
            path = Path(folder, f"{len(paths):06d}.tar")
            with (
                atomic_write(path) as temporary,
                temporary.open("wb") as file,
                webdataset.TarWriter(file, encoder=False, mtime=0) as writer,
            ):
                for index in range(start, min(start + samples_per_shard, len(dataset))):
                    writer.write(_members(dataset.records[index], index, dataset.max_pixels))
                    bar.update()
            paths.append(str(path))
    return paths


def _members(record: Quadruplet, index: int, max_pixels: int) -> dict[str, Any]:
    texts = {
        "safe_text": record.safe_text,
        "unsafe_text": record.unsafe_text,
        "unsafe_text_label": record.unsafe_text_label,
        "unsafe_image_label": record.unsafe_image_label,
    }
    safe, unsafe = _stored(record.safe_image, max_pixels), _stored(record.unsafe_image, max_pixels)
    return {
        "__key__": f"{index:08d}",
        f"safe_image.{safe[0]}": safe[1],
        f"unsafe_image.{unsafe[0]}": unsafe[1],
        "json": json.dumps(texts).encode(),
    }


def _stored(image: ImageRef, max_pixels: int) -> tuple[str, bytes]:
    """(suffix, bytes) to write: as stored where shards may hold the format, else PNG."""
    if not isinstance(image, ImageArray):
        data = image.content()
        with opened(data, str(image), max_pixels) as found:
            suffix = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}.get(found.format or "")
        if suffix is not None:
            return suffix, data
    buffer = io.BytesIO()
    image.load(max_pixels).save(buffer, "PNG")
    return "png", buffer.getvalue()
