"""What can be known of a source of data by its name alone, before torch is imported or a model loaded."""

from __future__ import annotations

import os
from pathlib import Path

from .errors import DataError

SCHEMES = ("scenes", "photos")  # generated: what follows the colon are options
TABLES = (".csv", ".tsv", ".jsonl", ".ndjson", ".parquet")


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
    path, suffix = Path(source), Path(source).suffix.lower()
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
            f"{', '.join(TABLES)}, .tar, or a folder of .tar shards"
        )


def shard_paths(source: str | os.PathLike) -> list[str]:
    """The tar files that `source` names, in order: a .tar, a folder of them, a glob, or braces.

    Raises DataError where there is none, or one is named twice.
    """
    from braceexpand import braceexpand

    path = Path(source)
    if path.is_dir():
        paths = sorted(path.glob("*.tar"))
    elif path.exists():
        paths = [path]
    else:
        patterns = [Path(part) for part in braceexpand(str(source))]
        paths = [path for part in patterns for path in (sorted(part.parent.glob(part.name)) or [part])]
    if not paths:
        raise DataError(f"no .tar shard in {source}")
    if len(set(paths)) < len(paths):
        raise DataError(f"{source} names a shard twice")
    return [str(path) for path in paths]
