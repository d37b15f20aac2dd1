"""A generation as Python has it: rates by name, each with its interval."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..evaluate.result import Evaluation, Figure
from ..evaluate.tables import table

FORMAT = "saferclip_fast.generation.v1"
RESULT, SCORES, PAGE = "generation.json", "scores.jsonl", "generation.html"


@dataclass(frozen=True)
class Generated:
    """What `sf.generate` made and measured; `print` shows the rates.

    Attributes:
        rates: each Figure by its name: "harm", "harm.JUDGE.KIND", "prompts.CATEGORY"; the samples are prompts.
        prompts: how many prompts there were.
        images: how many images were made for each of them, with each encoder.
        out: the folder with the images (frozen/, tuned/), generation.json and generation.html.
        json: the content of generation.json.
    """

    rates: Mapping[str, Figure]
    prompts: int
    images: int
    out: Path
    json: Mapping[str, Any] = field(default_factory=dict, repr=False)

    @classmethod
    def read(cls, found: Mapping[str, Any], out: Path) -> Generated:
        """The result of what generation.json holds."""
        return cls(Evaluation.read(found, None, None).metrics, found["rows"], found["images"], out, found)

    def __str__(self) -> str:
        return table(self.json)
