"""An evaluation as text: figures with their intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def table(evaluation: Mapping[str, Any], everything: bool = False) -> str:
    """The key metrics, or all of them, as text with intervals."""
    metrics = evaluation["metrics"]
    return _lines([metrics[name] for name in (metrics if everything else evaluation["key_metrics"])])


def comparison(evaluations: Mapping[str, Mapping[str, Any]]) -> str:
    """The key metrics of models that were tuned from one frozen model, side by side, as text with intervals.

    evaluations: of each tuned model by name, on one task.
    """
    first = next(iter(evaluations.values()))
    entries = []
    for name in first["key_metrics"]:
        entry = first["metrics"][name]
        tuned = {model: evaluation["metrics"][name]["tuned"] for model, evaluation in evaluations.items()}
        entries.append({"label": entry["label"], "wanted": entry["wanted"], "frozen": entry["frozen"], **tuned})
    return _lines(entries, ("frozen", *evaluations))


def label_tables(evaluation: Mapping[str, Any]) -> str:
    """The unsafe side apart by its labels, a table for each combination that occurs, as text."""
    words = ("safe", "unsafe")
    return "\n\n".join(
        f"{words[part['text_is_unsafe']]} text, {words[part['image_is_unsafe']]} image: {part['rows']} rows\n"
        + _lines(list(part["metrics"].values()))
        for part in evaluation["safe_unsafe_table"]
    )


def _lines(entries: Sequence[Mapping[str, Any]], columns: Sequence[str] = ("frozen", "tuned", "change")) -> str:
    columns = [side for side in columns if entries and side in entries[0]]
    width = max((len(entry["label"]) for entry in entries), default=0)
    lines = [f"{'':{width}}" + "".join(f"  {column:21}" for column in columns) + "  wanted"]
    for entry in entries:
        cells = "".join(f"  {_cell(entry[column], signed=column == 'change')}" for column in columns)
        lines.append(f"{entry['label']:{width}}{cells}  {entry['wanted'] or '-'}")
    return "\n".join(lines)


def _cell(estimate: Mapping[str, float], signed: bool) -> str:
    value, low, high = (format(estimate[key], "+.3f" if signed else ".3f") for key in ("value", "low", "high"))
    return f"{value} [{low}, {high}]".ljust(21)
