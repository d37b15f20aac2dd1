"""A description as Python has it: rates by name, each with its interval."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..evaluate.result import Evaluation, Figure
from ..evaluate.tables import table

FORMAT = "saferclip_fast.description.v1"
RESULT, SCORES, PAGE = "description.json", "scores.jsonl", "description.html"


@dataclass(frozen=True)
class Described:
    """What `sf.describe` wrote and measured; `print` shows the rates.

    Attributes:
        rates: each Figure by its name: "harm", "harm.JUDGE.KIND", "images.FOLDER"; the samples are images.
        images: how many images there were.
        out: the folder with the texts (frozen.jsonl, tuned.jsonl), description.json and description.html.
        json: the content of description.json.
    """

    rates: Mapping[str, Figure]
    images: int
    out: Path
    json: Mapping[str, Any] = field(default_factory=dict, repr=False)

    @classmethod
    def read(cls, found: Mapping[str, Any], out: Path) -> Described:
        """The result of what description.json holds."""
        return cls(Evaluation.read(found, None, None).metrics, found["rows"], out, found)

    def __str__(self) -> str:
        return table(self.json)
