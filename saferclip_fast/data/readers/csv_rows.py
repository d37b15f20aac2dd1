"""Records of a CSV or TSV file, however it was exported; a stray quote costs its own line and no other."""

from __future__ import annotations

import codecs
import csv
import io
from collections import Counter, deque
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import IO, NamedTuple

from ..errors import DataError
from ..places import table_suffix
from .unpacked import limited_lines, unpacked

DELIMITERS = (",", ";", "\t", "|")


class Form(NamedTuple):
    """How a file separates its cells."""

    delimiter: str
    skip_space: bool = False  # after a separator


def read_csv(path: Path, wanted: Collection[str]) -> Iterator[tuple[int, list[str] | str]]:
    """(1, header), then for each record the line that it begins on and its cells, or why it cannot be read.

    The separator is that of a `sep=;` line (Excel's), else the one by which the header holds all `wanted` columns, else
    the suffix's. A byte order mark tells UTF-16 from UTF-8; other bytes become lone surrogates. Spaces after the
    separator are dropped where the header has them. Empty lines, and rows whose cells are all empty, are left out.

    A record may span lines. Where it cannot be read, reading goes on at the line after the one that it began on; so it
    does where a line inside it is a whole row by itself, since then a stray quote has most likely swallowed it. So each
    line of the file is in a record that is given, or in one that is reported.

    Raises DataError for an empty file, a header that cannot be read or names a column twice, and an unknown encoding.
    """
    encoding = _encoding(path)
    with unpacked(path) as raw, io.TextIOWrapper(raw, encoding, "surrogateescape", newline="") as file:
        lines = _Lines(file, path)
        first = lines.take()
        if first is not None and first.lower().startswith("sep=") and len(first.strip()) <= 5:
            form, first = Form(first[4:5].strip("\r\n") or "\t"), lines.take()
        elif first is not None:
            form = _form(first, "\t" if table_suffix(path) == ".tsv" else ",", wanted)
        if first is None or not first.strip():
            raise DataError(f"{path} is empty: a header line is needed")
        lines.put_back([first])
        header = _record(lines, form, 0)
        if isinstance(header, str):
            raise DataError(f"{path}, row 1: bad header: {header}")
        if any(cell.startswith(" ") for cell in header[1:]):
            form, header = form._replace(skip_space=True), [cell.strip() for cell in header]
        if doubled := [name for name, count in Counter(header).items() if count > 1 and name]:
            raise DataError(f"{path} has two columns {', '.join(map(repr, doubled))}: rename one")
        yield 1, header
        while lines.more():
            line = lines.number + 1
            cells = _record(lines, form, len(header))
            if isinstance(cells, str) or any(cells):
                yield line, cells


class _Lines:
    """The physical lines of a file, which can be put back; `number` counts those taken."""

    def __init__(self, file: IO[str], path: Path) -> None:
        self.file, self.ahead, self.number = limited_lines(file, path), deque[str](), 0
        self.path = path

    def more(self) -> bool:
        try:
            if not self.ahead and (line := next(self.file, "")):
                self.ahead.append(line)
        except UnicodeDecodeError as error:  # half a character at the end has no surrogate
            raise DataError(f"{self.path}: UTF-16, cut off or damaged ({error.reason}): save it again") from error
        return bool(self.ahead)

    def take(self) -> str | None:
        if not self.more():
            return None
        self.number += 1
        return self.ahead.popleft()

    def put_back(self, lines: list[str]) -> None:
        self.ahead.extendleft(reversed(lines))
        self.number -= len(lines)


class _Swallows(Exception):
    """A record holds a line that is a row by itself."""


def _record(lines: _Lines, form: Form, width: int) -> list[str] | str:
    """The cells of the record that begins on the next line, `width` of them (0: any), or what is wrong with it."""
    taken: list[str] = []

    def feed() -> Iterator[str]:
        while (line := lines.take()) is not None:
            taken.append(line)
            if len(taken) > 1 and width and len(_alone(line, form)) == width:
                raise _Swallows
            yield line

    try:
        cells = next(_parser(feed(), form), [])
    except (csv.Error, _Swallows) as error:
        lines.put_back(taken[1:])
        if isinstance(error, _Swallows):
            return f"a quote opens here, and line {lines.number + len(taken) - 1} inside it is a row by itself"
        reason = str(error)
        return "a quote opens here and never closes" if reason == "unexpected end of data" else reason
    if width and cells and len(cells) != width:
        lines.put_back(taken[1:])
        return f"has {len(cells)} cells where the header has {width}"
    return cells


def _alone(line: str, form: Form) -> list[str]:
    """The cells of one line; none where it is no whole record."""
    try:
        return next(_parser(iter([line]), form), [])
    except csv.Error:
        return []


def _parser(lines: Iterator[str], form: Form) -> Iterator[list[str]]:
    return csv.reader(lines, delimiter=form.delimiter, skipinitialspace=form.skip_space, strict=True)


def _form(header: str, usual: str, wanted: Collection[str]) -> Form:
    for delimiter in (usual, *DELIMITERS):
        if set(wanted) <= {cell.strip() for cell in _alone(header, Form(delimiter, skip_space=True))}:
            return Form(delimiter)
    return Form(usual)


def _encoding(path: Path) -> str:
    with unpacked(path) as file:
        start = file.read(4096)
    if start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "utf-16"
    if b"\0" in start:
        raise DataError(f"{path} holds zero bytes, so it is no UTF-8 text: save it as UTF-8")
    return "utf-8-sig"
