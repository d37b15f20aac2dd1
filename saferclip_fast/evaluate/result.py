"""An evaluation as Python has it: figures by name, each with its interval."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from .promise import Promise
from .tables import table


class Estimate(NamedTuple):
    """A figure and its 95 % bootstrap interval."""

    value: float
    low: float
    high: float


class Figure(NamedTuple):
    """One metric, of the tuned model and, where there is one, of the frozen model beside it."""

    label: str
    wanted: str | None  # where it should go: "falls", "rises", "stays"
    unit: str  # "share", "place", "cosine" or "to frozen" (1: as the frozen model)
    samples: int
    tuned: Estimate
    frozen: Estimate | None = None
    change: Estimate | None = None  # of the same resamples, so that it may be surer than the two


class DialPoint(NamedTuple):
    """The key metrics with the dial at `alpha`: 0 is the frozen model, 1 the tuned one."""

    alpha: float
    metrics: Mapping[str, Estimate]


@dataclass(frozen=True)
class Evaluation:
    """What `sf.evaluate` found; `print` shows the key metrics as a table.

    Attributes:
        metrics: every Figure by its name (docs/evaluation.md lists them); `evaluation[name]` is one.
        key_metrics: the names that a reader should see first.
        rows: held-out quadruplets.
        dial: points along the safety dial, if it was asked for.
        promise: the largest dial that keeps a bound on the loss of accuracy, if `max_loss` was given.
        out: the folder that was written, if one was.
        json: the content of evaluation.json.
    """

    metrics: Mapping[str, Figure]
    key_metrics: tuple[str, ...]
    rows: int
    dial: tuple[DialPoint, ...] = ()
    promise: Promise | None = None
    out: Path | None = None
    json: Mapping[str, Any] = field(default_factory=dict, repr=False)

    @classmethod
    def read(cls, evaluation: Mapping[str, Any], dial: Mapping[str, Any] | None, out: Path | None) -> Evaluation:
        """The result of an evaluation and a dial as the JSON files have them."""
        metrics = {name: _figure(entry) for name, entry in evaluation["metrics"].items()}
        points = tuple(
            DialPoint(point["alpha"], {name: _estimate(entry) for name, entry in point["metrics"].items()})
            for point in (dial or {"points": []})["points"]
        )
        kept = (dial or {}).get("promise")
        promised = kept and Promise(**{name: kept[name] for name in Promise._fields})
        return cls(metrics, tuple(evaluation["key_metrics"]), evaluation["rows"], points, promised, out, evaluation)

    def __getitem__(self, name: str) -> Figure:
        if name not in self.metrics:
            near = difflib.get_close_matches(name, self.metrics, 1)
            raise KeyError(f"no metric {name!r}" + (f", did you mean {near[0]!r}?" if near else "; see .metrics"))
        return self.metrics[name]

    def __str__(self) -> str:
        return table(self.json)


def _estimate(entry: Mapping[str, Any]) -> Estimate:
    return Estimate(entry["value"], entry["low"], entry["high"])


def _figure(entry: Mapping[str, Any]) -> Figure:
    sides = (_estimate(entry[side]) if side in entry else None for side in ("frozen", "change"))
    return Figure(entry["label"], entry["wanted"], entry["unit"], entry["samples"], _estimate(entry["tuned"]), *sides)
