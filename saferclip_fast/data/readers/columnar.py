"""Rows of Parquet files and of folders that `datasets` saved; images are paths, or bytes inside the file.

Images inside a Parquet file lie compressed, a row group at a time, so that shuffling would read each many times. They
are copied once into an Arrow file in the cache, which is mapped into memory as the files of `datasets` are.
"""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from ...storage.files import atomic_write
from ..errors import DataError
from ..images import MAX_PIXELS, ImageError, _file_stamp, decode

if TYPE_CHECKING:
    import pyarrow as pa

IMAGES = ("safe_image", "unsafe_image")
CACHE = ".cache/saferclip"  # where no cache_dir is given, as in a run's options
_BATCH = 256  # rows of a record batch in the copy


@dataclass(frozen=True)
class StoredImage:
    """An image in the Arrow file at `path`: its bytes in the row `row` (from 0) of `column`."""

    path: str
    column: str
    row: int
    origin: str = ""  # the Parquet file that the Arrow file is a copy of

    def __str__(self) -> str:
        return f"{self.origin or self.path}, row {self.row + 1}, {self.column}"

    def content(self) -> bytes:
        import pyarrow as pa

        try:
            cell = arrow_table(self.path)[self.column][self.row].as_py()
        except (OSError, IndexError, KeyError, UnicodeDecodeError, pa.ArrowException) as error:
            raise ImageError(f"cannot read image {self}: {error}") from error
        data = cell.get("bytes") if isinstance(cell, Mapping) else cell
        if not isinstance(data, bytes):
            raise ImageError(f"cannot read image {self}: no bytes in it")
        return data

    def stamp(self) -> str:
        return f"{_file_stamp(self.origin or self.path)}@{self.row}:{self.column}"

    def load(self, max_pixels: int = MAX_PIXELS) -> Image.Image:
        return decode(self.content(), str(self), max_pixels)


def read_columnar(
    path: Path, names: Mapping[str, str], wanted: list[str], cache_dir: str | os.PathLike | None
) -> Iterator[tuple[int, dict[str, Any]]]:
    """(row from 1, values) of the columns `wanted` of a Parquet or Arrow file; images held as bytes are StoredImage.

    Raises DataError for a file that cannot be read, or whose images are neither paths nor bytes.
    """
    pa = pyarrow_for(path)
    try:
        schema = schema_of(path)
        wanted = [name for name in wanted if name in schema.names]
        held = [names[field] for field in IMAGES if names.get(field) in wanted and _holds(path, schema, names[field])]
        copy = path
        if held and path.suffix.lower() == ".parquet":
            copy = _copied(path, held, Path(cache_dir or CACHE))
        row = 0
        for batch in _batches(path, wanted, held, copy):
            present = {name: _present(batch[name]) for name in held}
            plain = {name: _paths(batch[name]) if name in held else batch[name].to_pylist() for name in wanted}
            for i in range(len(batch[wanted[0]])):
                values = {name: column[i] for name, column in plain.items()}
                origin = "" if copy == path else str(path)
                values |= {n: StoredImage(str(copy), n, row, origin) for n in held if present[n][i]}
                row += 1
                yield row, values
    except (pa.ArrowException, UnicodeDecodeError) as error:
        raise _unreadable(path, error) from error


def pyarrow_for(path: Path) -> Any:
    """The package, which reading `path` needs. Raises DataError where it is not installed."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise DataError(f"reading {path} needs pyarrow: pip install 'saferclip-fast[parquet]'") from error
    return pyarrow


def schema_of(path: Path) -> pa.Schema:
    """The columns of a Parquet or Arrow file. Raises DataError where it cannot be read."""
    pa = pyarrow_for(path)
    try:
        return pa.parquet.read_schema(path) if path.suffix.lower() == ".parquet" else arrow_table(str(path)).schema
    except (pa.ArrowException, UnicodeDecodeError) as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> DataError:
    if path.suffix.lower() == ".parquet":
        return DataError(f"{path} is not a readable Parquet file: {error}")
    return DataError(f"{path} is not a readable Arrow file of `datasets`: {error}")


def arrow_table(path: str) -> pa.Table:
    """The rows of a file of Arrow's stream format, mapped: read from disk where they are used."""
    return _mapped(path, _file_stamp(path))


@functools.lru_cache(maxsize=64)
def _mapped(path: str, stamp: str) -> pa.Table:
    import pyarrow as pa

    table = pa.ipc.open_stream(pa.memory_map(path)).read_all()
    table.validate(full=True)  # that no offset leads out of the file, which Arrow itself believes; reads no image
    return table


def _batches(path: Path, wanted: list[str], held: list[str], copy: Path) -> Iterator[dict[str, Any]]:
    """Columns by name, a few rows at a time; those that are held are of `copy`, and only their nulls are read."""
    import pyarrow.parquet as pq

    if path.suffix.lower() != ".parquet":
        for batch in arrow_table(str(path)).select(wanted).to_batches():
            yield dict(zip(batch.schema.names, batch.columns, strict=True))
        return
    start = 0
    with pq.ParquetFile(path) as file:
        for batch in file.iter_batches(columns=[name for name in wanted if name not in held]):
            columns = dict(zip(batch.schema.names, batch.columns, strict=True))
            columns |= {name: arrow_table(str(copy))[name].slice(start, len(batch)) for name in held}
            start += len(batch)
            yield columns


def _copied(path: Path, held: list[str], cache_dir: Path) -> Path:
    """The columns `held` of a Parquet file as an Arrow file in the cache, made once while the file stays as it is."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    key = hashlib.sha256(f"{_file_stamp(str(path))} {held}".encode()).hexdigest()[:24]
    copy = cache_dir / f"images-{key}.arrow"
    if not copy.is_file():
        with pq.ParquetFile(path) as file, atomic_write(copy) as temporary:
            schema = pa.schema([file.schema_arrow.field(name) for name in held])
            with pa.OSFile(str(temporary), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
                for batch in file.iter_batches(_BATCH, columns=held):
                    writer.write_batch(batch.select(held).cast(schema))
    return copy


def _holds(path: Path, schema: pa.Schema, name: str) -> bool:
    """Whether a column holds images, not their paths. Raises DataError where it is neither."""
    import pyarrow as pa

    kind = schema.field(name).type
    if str(kind).startswith(("string", "large_string", "dictionary", "null")):
        return False
    inner = kind
    if pa.types.is_struct(kind):
        inner = kind.field("bytes").type if kind.get_field_index("bytes") >= 0 else pa.null()
    if not (pa.types.is_binary(inner) or pa.types.is_large_binary(inner)):
        raise DataError(
            f"{path}: column {name!r} holds {kind!s:.60}: an image is a path, the bytes of an image file, or "
            "{bytes, path} as `datasets` writes it"
        )
    return True


def _present(column: Any) -> list[bool]:
    """Whether each row of a column of images holds bytes; these stay where they are."""
    import pyarrow as pa
    import pyarrow.compute as pc

    valid = pc.is_valid(column)
    if pa.types.is_struct(column.type):
        valid = pc.and_(valid, pc.is_valid(pc.struct_field(column, "bytes")))
    return valid.to_pylist()


def _paths(column: Any) -> list[str | None]:
    """The paths beside the bytes, for rows that hold no bytes."""
    import pyarrow as pa
    import pyarrow.compute as pc

    if pa.types.is_struct(column.type) and column.type.get_field_index("path") >= 0:
        return pc.struct_field(column, "path").to_pylist()
    return [None] * len(column)
