"""One function that opens quadruplets of any format."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from .errors import DataError, ErrorPolicy
from .images import MAX_PIXELS
from .places import TABLES, check_place, columnar_files, table_suffix
from .quadruplets import Quadruplet, QuadrupletDataset
from .readers.shards import read_shards
from .readers.tables import read_table
from .readers.visu import read_visu
from .synthetic.photos import PhotoDataset
from .synthetic.scenes import SceneDataset
from .transforms import Transform

GENERATED: dict[str, Callable[..., QuadrupletDataset]] = {"scenes": SceneDataset, "photos": PhotoDataset}


def open_quadruplets(
    source: str | os.PathLike,
    *,
    transform: Transform | None = None,
    on_error: str = "raise",
    root: str | os.PathLike | None = None,
    columns: Mapping[str, str] | None = None,
    allow_absolute: bool = False,
    unsafe_root: str | os.PathLike | None = None,
    unsafe_image: str | None = None,
    text_only: bool = False,
    max_pixels: int = MAX_PIXELS,
    verify: bool | None = None,
    cache_dir: str | os.PathLike | None = None,
    progress: bool = True,
) -> QuadrupletDataset:
    """Open `source`, choosing the reader by its name.

    source: "scenes:n=3000,seed=0,..." (SceneDataset's options), "photos:path=FILE.tar,..." (PhotoDataset's),
    a ViSU or NSFWCaps .json, a .csv, .tsv, .jsonl or .ndjson table (these may be compressed: .gz, .zst), .parquet
    files (one, a folder, a glob or braces), a folder that `datasets` saved, or WebDataset shards (a .tar, a folder of
    them, a glob or braces). transform: RGB PIL image -> tensor (default ToTensor: float32 [3, H, W] in [0,
    1]). on_error: "raise", or "skip" to leave bad rows out and count them in `.summary`. root: folder of a
    table's images (default: the table's). columns: field -> column name. allow_absolute: admit absolute image
    paths. unsafe_root, unsafe_image: see read_visu. text_only: there are no unsafe images, or they are left alone; the
    safe image stands in their place, labeled safe (`QuadrupletDataset.text_only`). max_pixels: refuse larger images.
    verify: decode every image now (default: only if on_error is "skip", so that what is skipped is settled before
    training); cache_dir keeps the outcome for later runs over unchanged files, and images that lie inside .parquet
    files (default for these: .cache/saferclip). progress: show its bar.

    Raises DataError naming file and row for bad input, ValueError for a source or option that does not fit.
    """
    if not isinstance(source, str | os.PathLike):
        raise DataError(
            f"source is a {type(source).__name__}, not a path: data.open_rows(DATA, FOLDER) opens rows in memory"
        )
    text = os.fspath(source)
    policy = ErrorPolicy(on_error, text)
    check_source(text, root)
    scheme, _, options = text.partition(":")
    if scheme in GENERATED:
        dataset = _generate(scheme, text, parse_options(options), on_error, transform)
        return dataset.without_unsafe_images() if text_only else dataset
    read = Reading(root, columns, allow_absolute, unsafe_root, unsafe_image, text_only, cache_dir)
    dataset = QuadrupletDataset(_read(text, policy, read), transform, policy, max_pixels, text_only)
    if on_error == "skip" if verify is None else verify:
        dataset = dataset.verify(cache_dir, progress)
    return dataset


def check_source(source: str, root: str | os.PathLike | None = None) -> None:
    """What can be known of a source without reading it: open_quadruplets begins with it, a command before its model.

    Raises DataError where nothing is there, ValueError for an unknown format or option, or a missing `root`.
    """
    scheme, _, options = source.partition(":")
    if scheme in GENERATED:
        known = sorted(set(inspect.signature(GENERATED[scheme]).parameters) - {"transform"})
        if unknown := sorted(set(parse_options(options)) - set(known)):
            raise ValueError(f"source {source!r} has no option {', '.join(unknown)}; known: {', '.join(known)}")
    check_place(source, root)


def _generate(
    scheme: str, source: str, options: dict[str, Any], on_error: str, transform: Transform | None
) -> QuadrupletDataset:
    if "on_error" in inspect.signature(GENERATED[scheme]).parameters:
        options.setdefault("on_error", on_error)
    try:
        return GENERATED[scheme](**options, transform=transform)
    except TypeError as error:  # a missing option, or text where a number belongs
        raise ValueError(f"bad option in source {source!r}: {error}") from error


class Reading(NamedTuple):
    """How files are read: the options of open_quadruplets."""

    root: str | os.PathLike | None
    columns: Mapping[str, str] | None
    allow_absolute: bool
    unsafe_root: str | os.PathLike | None
    unsafe_image: str | None
    text_only: bool
    cache_dir: str | os.PathLike | None


def _read(source: str, policy: ErrorPolicy, read: Reading) -> list[Quadruplet]:
    suffix = table_suffix(source)
    if files := columnar_files(source) or ([source] if suffix in TABLES else []):
        options = read.root, read.columns, read.allow_absolute, read.cache_dir, read.text_only
        return [record for file in files for record in read_table(file, policy, *options)]
    if suffix == ".json":
        assert read.root, "check_source asks for it"
        places = read.root, read.unsafe_root, read.unsafe_image
        return read_visu(source, policy, *places, read.allow_absolute, read.text_only)
    return read_shards(source, policy, read.columns, read.text_only)


def parse_options(text: str) -> dict[str, Any]:
    """Parse "name=value,name=value": values become int, float or bool where they read as such.

    Raises ValueError for a part without "=", and for a name that is given twice.
    """
    options: dict[str, Any] = {}
    for item in filter(None, text.split(",")):
        name, equals, value = item.partition("=")
        if not equals:
            raise ValueError(f"expected name=value, got {item!r} in {text!r}")
        if name.strip() in options:
            raise ValueError(f"{name.strip()} is given twice in {text!r}")
        options[name.strip()] = _value(value.strip())
    return options


def _value(text: str) -> int | float | str | bool:
    if text in ("true", "false"):
        return text == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
