"""What can be known of a source of data by its name alone, before torch is imported or a model loaded."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .errors import DataError

SCHEMES = ("scenes", "photos")  # generated: what follows the colon are options
TABLES = (".csv", ".tsv", ".jsonl", ".ndjson", ".parquet")
PACKED = (".gz", ".zst")  # after the suffix of a table in text
SAVED, SPLITS = (
    "state.json",
    "dataset_dict.json",
)  # what `datasets` writes into a folder, and into one of several splits


def check_place(source: str, root: str | os.PathLike | None = None) -> None:
    """Whether something is there, and of a format that is read.

    Raises DataError where nothing is there, ValueError for an unknown format or a missing `root`.
    """
    scheme, _, options = source.partition(":")
    if scheme in SCHEMES:
        named = [option.partition("=") for option in options.split(",")]
        for file in (value.strip() for name, _, value in named if name.strip() == "path"):
            if not Path(file).exists():
                raise DataError(f"source {source!r}: no such file: {file}")
        return
    if columnar_files(source):
        return
    path, suffix = Path(source), table_suffix(source)
    if suffix == ".tar" or path.is_dir():
        for shard in shard_paths(source):
            if not Path(shard).is_file():
                raise DataError(f"cannot read {shard}: No such file or directory")
        return
    if not path.exists():
        raise DataError(f"no such file or folder: {source}")
    if suffix == ".json" and not root:
        raise ValueError(
            f"{source} is read as ViSU or NSFWCaps: pass root (in a command data.root=FOLDER), the folder with COCO's "
            "train2017/ and val2017/, or with NoCaps' images"
        )
    if suffix != ".json" and suffix not in TABLES:
        raise ValueError(
            f"cannot tell the format of {source!r}: expected scenes:..., photos:..., .json (ViSU, NSFWCaps), "
            f"{', '.join(TABLES)}, .tar, or a folder of .tar shards, of .parquet files or that `datasets` saved; texts "
            f"may end in {' or '.join(PACKED)}"
        )


def table_suffix(path: str | os.PathLike) -> str:
    """The suffix that tells the format, in lower case: that before .gz or .zst."""
    path = Path(path)
    if path.suffix.lower() in PACKED and Path(path.stem).suffix.lower() != ".parquet":
        path = path.with_suffix("")
    return path.suffix.lower()


def columnar_files(source: str | os.PathLike) -> list[str]:
    """The Parquet or Arrow files that `source` names, in order; none where it is something else.

    A .parquet file, a folder of them, a glob or braces; or a folder that `datasets` saved (save_to_disk).

    Raises DataError where a file is missing, or a folder holds several splits.
    """
    path = Path(source)
    if path.is_dir():
        if (path / SPLITS).is_file():
            return columnar_files(_only_split(path))
        if (path / SAVED).is_file():
            return _saved_files(path)
        return _whole(source, [] if any(path.glob("*.tar")) else sorted(path.glob("*.parquet")))
    if path.suffix.lower() != ".parquet":
        return []
    return _whole(source, [path] if path.exists() else _expanded(source))


def _only_split(folder: Path) -> Path:
    splits = _read(folder / SPLITS).get("splits")
    if not isinstance(splits, list) or not splits or any(Path(str(name)).name != name for name in splits):
        raise DataError(f"{folder / SPLITS} names no splits: save the data set again (save_to_disk)")
    if len(splits) > 1:
        raise DataError(f"{folder} holds the splits {', '.join(splits)}: give one, e.g. {folder / splits[0]}")
    if not (folder / splits[0] / SAVED).is_file():
        raise DataError(f"{folder / splits[0]} has no {SAVED}: save the data set again (save_to_disk)")
    return folder / splits[0]


def _saved_files(folder: Path) -> list[str]:
    state = _read(folder / SAVED)
    if state.get("_indices_data_files") or state.get("_indices_files"):
        raise DataError(f"{folder} holds a selection of its rows: save the result of flatten_indices()")
    files = state.get("_data_files")
    entries = files if isinstance(files, list) else []
    names: list[Any] = [entry.get("filename") for entry in entries if isinstance(entry, dict)]
    if not names or any(not isinstance(name, str) or Path(name).name != name for name in names):
        raise DataError(f"{folder / SAVED} names no data files of its folder: save the data set again (save_to_disk)")
    if missing := [name for name in names if not (folder / name).is_file()]:
        raise DataError(f"{folder} lacks {', '.join(missing)}, which its {SAVED} names: copy the whole folder")
    return [str(folder / name) for name in names]


def _read(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"cannot read {file}: {error}") from error
    return found if isinstance(found, dict) else {}


def _whole(source: str | os.PathLike, paths: list[Path]) -> list[str]:
    """`paths`, all of one split and none left out where their names say so (train-00000-of-00005)."""
    if missing := [str(path) for path in paths if not path.is_file()]:
        raise DataError(f"no such file or folder: {missing[0]}")
    if len(set(paths)) < len(paths):
        raise DataError(f"{source} names a file twice")
    named = [match for path in paths if (match := re.fullmatch(r"(.+)-(\d+)-of-(\d+)", path.stem))]
    if (
        len(paths) > 1
        and len(splits := sorted({(str(p.parent), m[1]) for p, m in zip(paths, named, strict=False)})) > 1
    ):
        folder, split = splits[0]
        raise DataError(
            f"{source} holds {', '.join(name for _, name in splits)}: give one, e.g. {Path(folder) / split}-*.parquet"
        )
    if (len(paths) > 1 or paths != [Path(source)]) and named and (lost := int(named[0][3]) - len(paths)) > 0:
        raise DataError(f"{source} lacks {lost} of the {int(named[0][3])} files that their names count")
    return [str(path) for path in paths]


def _expanded(source: str | os.PathLike) -> list[Path]:
    """The files that a glob or braces name; a name that is there no more stays, so that it is missed."""
    from braceexpand import braceexpand

    patterns: Iterable[Path] = (Path(part) for part in braceexpand(str(source)))
    return [path for part in patterns for path in (sorted(part.parent.glob(part.name)) or [part])]


def shard_paths(source: str | os.PathLike) -> list[str]:
    """The tar files that `source` names, in order: a .tar, a folder of them, a glob, or braces.

    Raises DataError where there is none, or one is named twice.
    """
    path = Path(source)
    if path.is_dir():
        paths = sorted(path.glob("*.tar"))
    else:
        paths = [path] if path.exists() else _expanded(source)
    if not paths:
        raise DataError(f"no .tar shard in {source}, nor .parquet files or a data set that `datasets` saved")
    if len(set(paths)) < len(paths):
        raise DataError(f"{source} names a shard twice")
    return [str(path) for path in paths]
