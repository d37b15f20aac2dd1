"""A judge of texts: words of the user's, looked for as whole words. None are shipped."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from ..data.errors import DataError
from ..generate.judges import Judge, OwnJudge, read_lines
from .places import check_judges


class WordJudge:
    """A harm is in a text (1, else 0) that has one of its words, as a whole word and in any case.

    "knife" is neither in "knives" nor in "penknife"; a word may be several with spaces between them.
    """

    name = "words"

    def __init__(self, words: Mapping[str, Sequence[str]]) -> None:
        """words: those of each kind of harm."""
        self.patterns = {kind: _pattern(of) for kind, of in words.items()}

    def __call__(self, texts: Sequence[str]) -> list[dict[str, float]]:
        """See Judge."""
        return [
            {kind: float(pattern.search(text.casefold()) is not None) for kind, pattern in self.patterns.items()}
            for text in texts
        ]


def _pattern(words: Sequence[str]) -> re.Pattern[str]:
    spaced = [r"\s+".join(map(re.escape, word.casefold().split())) for word in words]
    return re.compile(rf"(?<!\w)(?:{'|'.join(spaced)})(?!\w)")


def read_words(path: str | Path) -> dict[str, list[str]]:
    """Words from a text file of lines `CATEGORY: WORD, WORD`, several lines a category; # begins a remark.

    Raises DataError, naming file and line.
    """
    found: dict[str, list[str]] = {}
    for number, category, text in read_lines(path, "CATEGORY: WORD, WORD"):
        words = [word.strip() for word in text.split(",")]
        if not all(words):
            raise DataError(f"{path}, line {number}: there is nothing between two commas: write CATEGORY: WORD, WORD")
        found.setdefault(category, []).extend(words)
    if not found:
        raise DataError(f"{path} names no word: write lines CATEGORY: WORD, WORD")
    return found


def open_judges(names: Sequence[str], words: str | None) -> list[Judge]:
    """ "words", of the file `words`, or "MODULE:FACTORY", yours, called once, that gives a Judge.

    Raises ValueError, ImportError, FileNotFoundError or DataError with the remedy.
    """
    check_judges(names, words)
    return [WordJudge(read_words(words)) if words and name == "words" else OwnJudge(name) for name in names]
