"""The members of an uncompressed tar file and where their bytes lie, for random access without unpacking."""

from __future__ import annotations

import os
import tarfile
from collections.abc import Iterator
from pathlib import Path

from ..errors import DataError
from ..images import TarMember


def index_tar(path: str | os.PathLike) -> Iterator[TarMember]:
    """Yield the regular files of a tar in order; links, folders, devices and sparse files are left out.

    Raises DataError for a file that is missing, not a tar, compressed, or cut off (after the members before
    it).
    """
    path = str(path)
    try:
        size = Path(path).stat().st_size
        with tarfile.open(path, "r:") as archive:
            while (member := archive.next()) is not None:
                archive.members = []  # type: ignore[attr-defined]  # tarfile would keep every header in memory
                if not member.isreg() or member.issparse():
                    continue
                if member.offset_data + member.size > size:
                    raise DataError(f"{path}: the file ends inside {member.name!r} (truncated download?)")
                yield TarMember(path, member.name, member.offset_data, member.size)
            _check_end(path, archive.offset)
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from error
    except tarfile.TarError as error:
        raise DataError(
            f"{path} is not a readable tar file: {error} (compressed ones must be decompressed first)"
        ) from error


def _check_end(path: str, offset: int) -> None:
    """tarfile stops silently at a damaged or cut header; a whole archive ends in a block of zeros."""
    with Path(path).open("rb") as file:
        file.seek(offset)
        if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise DataError(f"{path}: no end-of-archive mark at byte {offset}: the file is damaged or cut off there")
