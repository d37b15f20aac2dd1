"""Tables in text as bytes, whether they are compressed (.gz, .zst) or not."""

from __future__ import annotations

import gzip
import io
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from ..errors import DataError

MAX_LINE = 1 << 24  # bytes or characters; a caption is short, and a small file may unpack to a line of any length


@contextmanager
def unpacked(path: Path) -> Iterator[IO[bytes]]:
    """The bytes of the file at `path`, unpacked where its name ends in .gz or .zst.

    Raises DataError where they cannot be unpacked, inside the body too.
    """
    suffix = path.suffix.lower()
    if suffix not in (".gz", ".zst"):
        with path.open("rb") as file:
            yield file
        return
    try:
        opening: Any = gzip.open if suffix == ".gz" else _zstandard
        with opening(path) as file:
            yield file
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"cannot unpack {path}: {error} (a download cut short?)") from error
    except OSError as error:
        if error.errno is None:  # of the decoder, not of the system
            raise DataError(f"cannot unpack {path}: {error} (a download cut short?)") from error
        raise


def limited_lines(file: IO[Any], path: Path) -> Iterator[Any]:
    """The lines of a file. Raises DataError for one that no table has, before it fills the memory."""
    number = 0
    while line := file.readline(MAX_LINE):
        number += 1
        if len(line) == MAX_LINE:
            raise DataError(f"{path}, row {number}: a line of more than {MAX_LINE} characters: not a table of captions")
        yield line


def read_all(path: Path, limit: int = 1 << 33) -> bytes:
    """All bytes of the file, unpacked. Raises DataError where they are more than `limit`."""
    with unpacked(path) as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise DataError(f"{path} unpacks to more than {limit >> 30} GiB")
    return data


def _zstandard(path: Path) -> Any:
    try:
        import pyarrow as pa
    except ImportError as error:
        raise DataError(f"reading {path} needs pyarrow: pip install 'saferclip-fast[parquet]'") from error
    return io.BufferedReader(_Raw(pa.input_stream(str(path), compression="zstd")))


class _Raw(io.RawIOBase):
    """An Arrow stream as Python's files are, whose lines io.BufferedReader finds."""

    def __init__(self, stream: Any) -> None:
        self.stream = stream

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self.stream.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        self.stream.close()
        super().close()
