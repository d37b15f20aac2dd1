"""An evaluation as text: figures with their intervals, those of the first K items side by side."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from ..results import CUTOFFS, PAGE, cutoffs, in_first, of_any_cutoff

TITLE = f" {in_first('K')}"  # of the columns, so that no label has to repeat it
Columns = Mapping[str, tuple[Mapping[str, Any], str]]  # a column's name -> its metrics, and which side of them


def table(evaluation: Mapping[str, Any], everything: bool = False) -> str:
    """The key metrics, or all of them, as text with intervals.

    A rate among the first K has a line for each model and a column for each K, with the interval of the page's K; the
    figures that have no K follow.
    """
    metrics = evaluation["metrics"]
    return _lines(_columns(metrics), metrics if everything else evaluation["key_metrics"])


def comparison(evaluations: Mapping[str, Mapping[str, Any]]) -> str:
    """The key metrics of models that were tuned from one frozen model, as `table` shows them.

    evaluations: of each tuned model by name, on one task.
    """
    first = next(iter(evaluations.values()))
    tuned = {name: (evaluation["metrics"], "tuned") for name, evaluation in evaluations.items()}
    return _lines({"frozen": (first["metrics"], "frozen"), **tuned}, first["key_metrics"])


def label_tables(evaluation: Mapping[str, Any]) -> str:
    """The unsafe side apart by its labels, a table for each combination that occurs, as text."""
    words = ("safe", "unsafe")
    return "\n\n".join(
        f"{words[part['text_is_unsafe']]} text, {words[part['image_is_unsafe']]} image: {part['rows']} rows\n"
        + _lines(_columns(part["metrics"]), part["metrics"])
        for part in evaluation["safe_unsafe_table"]
    )


def _columns(metrics: Mapping[str, Any]) -> Columns:
    found: Mapping[str, Any] = next(iter(metrics.values()), {})
    return {side: (metrics, side) for side in ("frozen", "tuned", "change") if side in found}


def _lines(columns: Columns, names: Iterable[str]) -> str:
    metrics, _ = next(iter(columns.values()), ({}, ""))
    families: dict[str, dict[int, str]] = {}
    others = []
    for name in names:
        if found := cutoffs(name, metrics):
            families.setdefault(name.rpartition("@")[0], found)
        else:
            others.append(name)
    parts = [_by_cutoff(columns, families.values()) if families else "", _plain(columns, others) if others else ""]
    return "\n\n".join(filter(None, parts))


def _by_cutoff(columns: Columns, families: Iterable[Mapping[int, str]]) -> str:
    """A block of lines for each rate: of every model its value at each K, and the interval of one."""
    metrics, _ = next(iter(columns.values()))
    families = list(families)
    labels = [of_any_cutoff(metrics[next(iter(names.values()))]["label"]).removesuffix(TITLE) for names in families]
    label_width, model_width = max(map(len, (TITLE, *labels))), max(map(len, columns))
    widths = {k: (23 if "change" in columns else 20) if k == PAGE else 6 for k in CUTOFFS}
    heads = "".join(f"  {f'K={k}':>{width}}" for k, width in widths.items())
    lines = [f"{TITLE.strip():{label_width}}  {'':{model_width}}{heads}  wanted"]
    for label, names in zip(labels, families, strict=True):
        for number, (model, (found, side)) in enumerate(columns.items()):
            cells = "".join(f"  {_cell_of(found[name][side], k, side):>{widths[k]}}" for k, name in names.items())
            wanted = metrics[next(iter(names.values()))]["wanted"] or "-"
            start = (label, f"  {wanted}") if number == 0 else ("", "")
            lines.append(f"{start[0]:{label_width}}  {model:{model_width}}{cells}{start[1]}")
    return "\n".join(lines)


def _cell_of(estimate: Mapping[str, float], k: int, side: str) -> str:
    signed = side == "change"
    return _cell(estimate, signed) if k == PAGE else _number(estimate["value"], signed)


def _plain(columns: Columns, names: Iterable[str]) -> str:
    """A line for each figure, a column for each model."""
    metrics, _ = next(iter(columns.values()))
    entries = [(name, metrics[name]) for name in names]
    width = max(len(entry["label"]) for _, entry in entries)
    lines = [f"{'':{width}}" + "".join(f"  {column:22}" for column in columns) + "  wanted"]
    for name, entry in entries:
        cells = "".join(f"  {_cell(found[name][side], side == 'change'):22}" for found, side in columns.values())
        lines.append(f"{entry['label']:{width}}{cells}  {entry['wanted'] or '-'}")
    return "\n".join(lines)


def _cell(estimate: Mapping[str, float], signed: bool) -> str:
    value, low, high = (_number(estimate[key], signed) for key in ("value", "low", "high"))
    return f"{value} [{low}, {high}]"


def _number(value: float, signed: bool) -> str:
    """Three digits behind the point, fewer of a place in a long list."""
    digits = 3 if abs(value) < 10 else 1 if abs(value) < 1000 else 0
    return f"{value:{'+' if signed else ''}.{digits}f}"


def published_lines(found: Mapping[str, Any]) -> str:
    """A published table with our figures beside it, in percent, as text: what table-NAME.json holds.

    Rows that could not be measured are left out where the paper has no figure for them either.
    """
    sides = list(found["models"])
    shown = [
        row for row in found["rows"] if "absent" not in row or any(v is not None for v in row["published"].values())
    ]
    width = max(len(row["label"]) for row in shown)
    heads = "".join(f"  {column:>10}" for column in found["columns"])
    lines = [f"{'':{width}}{heads}" + "".join(f"  {f'yours, {side}':>20}" for side in sides) + "        n  wanted"]
    for row in shown:
        known = "".join(f"  {'-' if value is None else f'{value:.1f}':>10}" for value in row["published"].values())
        if "absent" in row:
            lines.append(f"{row['label']:{width}}{known}  {row['absent']}")
            continue
        ours = "".join(f"  {'{value:.1f} [{low:.1f}, {high:.1f}]'.format(**row[side]):>20}" for side in sides)
        lines.append(f"{row['label']:{width}}{known}{ours}  {row['samples']:>7}  {row['wanted'] or '-'}")
    parts = [f"{found['title']}, percent\n{found['cited']}", "\n".join(lines)]
    parts.append("where yours may differ:\n" + "\n".join(f"  {line}" for line in found["differences"]))
    if found["missing"]:
        lost = (f"  {name}: {entry['reason']}; {entry['where']}" for name, entry in found["missing"].items())
        parts.append("left out:\n" + "\n".join(lost))
    return "\n\n".join(parts)
