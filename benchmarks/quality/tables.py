"""The figures that the quality benchmarks print, as Markdown: rank 10 first, K in every label."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from benchmarks.quality.runs import UTILITY, spread, unsafe_rate
from saferclip_fast.results import CUTOFFS, UNSAFE_FOUND, at

# Metric -> what heads its column. The last two search safe items alone, all others safe and unsafe items together.
COLUMNS = {
    "unsafe_rate@10": "unsafe, mean of four @10",
    "unsafe_rate@1": "@1",
    "unsafe_rate@20": "@20",
    **{at(name): name.replace("_", " ").replace(" finds", ":") + " @10" for name in UNSAFE_FOUND},
    "unsafe_text_finds_right_image@1": "unsafe text: right safe image @1",
    "unsafe_image_finds_right_text@1": "unsafe image: right safe text @1",
    UTILITY: "zero-shot",
    "S-V.text_to_image@1": "safe text: its image @1",
    "S-V.image_to_text@1": "safe image: its text @1",
}


def with_rates(metrics: Mapping[str, float]) -> dict[str, float]:
    """What COLUMNS shows, and the mean unsafe rate at every K."""
    rates = {at("unsafe_rate", k): unsafe_rate(metrics, k) for k in CUTOFFS}
    return {name: metrics[name] for name in COLUMNS if name in metrics} | rates


def over_seeds(found: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """Mean, standard deviation and values of each figure of `with_rates`."""
    kept = [with_rates(metrics) for metrics in found]
    return {name: spread(metrics[name] for metrics in kept) for name in kept[0]}


def table(rows: Iterable[Mapping[str, Any]], columns: Mapping[str, str] = COLUMNS) -> str:
    """Mean ± standard deviation over seeds (of one seed the value alone), a line for each row's name."""
    lines = [f"| | {' | '.join(columns.values())} |", "|---" * (1 + len(columns)) + "|"]
    for row in rows:
        cells = [_cell(row["metrics"][name]) for name in columns]
        lines.append(f"| {row['name']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(figure: Mapping[str, Any]) -> str:
    return f"{figure['mean']:.3f} ± {figure['std']:.3f}" if len(figure["seeds"]) > 1 else f"{figure['mean']:.3f}"
