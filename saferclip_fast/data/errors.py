"""Bad rows: raised at once, or skipped and counted."""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import dataclass, field

from ..errors import UserError

log = logging.getLogger(__name__)

ON_ERROR = ("raise", "skip")
KEPT_PROBLEMS = 100  # messages kept in a summary; the counts are always complete


class DataError(UserError, ValueError):
    """A bad row or image; the message names the file and the row, and can be printed whatever bytes the file holds."""

    def __init__(self, message: str):
        super().__init__(printable(message))


def printable(text: str) -> str:
    """`text` with bytes that were not UTF-8 (lone surrogates) written as escapes, since no terminal takes them."""
    return text.encode("utf-8", "backslashreplace").decode()


@dataclass
class Summary:
    """How reading a source went: rows read, kept and skipped, and why (`reasons`: kind -> count)."""

    source: str
    read: int = 0
    skipped: int = 0
    reasons: Counter = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)

    @property
    def kept(self) -> int:
        return self.read - self.skipped

    def __str__(self) -> str:
        text = f"{self.source}: {self.read} rows read, {self.kept} kept, {self.skipped} skipped"
        if self.reasons:
            text += " (" + ", ".join(f"{count} {kind}" for kind, count in sorted(self.reasons.items())) + ")"
        return text


class ErrorPolicy:
    """Applies `on_error` ("raise" or "skip") to bad rows and keeps the summary."""

    def __init__(self, on_error: str, source: str):
        if on_error not in ON_ERROR:
            raise ValueError(f"on_error must be one of {ON_ERROR}, not {on_error!r}")
        self.on_error = on_error
        self.summary = Summary(source)

    def bad(self, kind: str, file: str, row: int, reason: object) -> None:
        """Report one bad row. Raises DataError when errors are fatal."""
        message = printable(f"{file}, row {row}: {reason}")
        if self.on_error == "raise":
            raise DataError(f'{message} (on_error="skip" would leave such rows out)')
        self.summary.skipped += 1
        self.summary.reasons[kind] += 1
        if len(self.summary.problems) < KEPT_PROBLEMS:
            self.summary.problems.append(message)
            log.warning("skipped %s", message)
