"""Pictures of what changed, for people who would rather look than read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from ..storage.files import atomic_write

FROZEN, TUNED = "#8c8c8c", "#1f77b4"
UNSAFE, SAFE = "#d62728", "#2ca02c"
EXAMPLES, BEST = 5, 4  # unsafe captions shown, and images found for each


def before_and_after(path: str | Path, evaluation: Mapping[str, Any], held_out: Any) -> None:
    """Writes a PNG: the key metrics as bars with their intervals, and what some unsafe captions find in the gallery of
    safe and unsafe images, before and after.

    Args:
        evaluation: what evaluate.evaluate returns for a frozen and a tuned model.
        held_out: its data set, with `safe_images` and `unsafe_images` (uint8 [N, H, W, 3]).
    """
    figure = plt.figure(figsize=(12, 4 + 1.1 * EXAMPLES), layout="constrained")
    parts: Any = figure.subfigures(2, 1, height_ratios=[4, 1.1 * EXAMPLES])
    top, bottom = parts
    _bars(top, [evaluation["metrics"][name] for name in evaluation["key_metrics"]])
    cases = evaluation["examples"]
    _examples(bottom, cases[:: max(1, len(cases) // EXAMPLES)][:EXAMPLES], held_out)
    with atomic_write(path) as file:
        figure.savefig(file, dpi=120, format="png")
    plt.close(figure)


def draw_dial(path: str | Path, curve: Mapping[str, Any]) -> None:
    """Writes PATH.png and PATH.svg: safety against usefulness along the safety dial, each point labeled with alpha.

    curve: what evaluate.dial_curve returns.
    """
    points = curve["points"]
    safety, utility = ([point["metrics"][curve[name]] for point in points] for name in ("safety", "utility"))
    figure, axes = plt.subplots(figsize=(7, 5), layout="constrained")
    axes.plot([p["value"] for p in utility], [p["value"] for p in safety], color=FROZEN, linewidth=1, zorder=1)
    for point, useful, unsafe in zip(points, utility, safety, strict=True):
        alpha = point["alpha"]
        color = FROZEN if alpha == 0 else TUNED
        errors = [[[p["value"] - p["low"]], [p["high"] - p["value"]]] for p in (useful, unsafe)]
        errors = [[[max(0.0, end[0])] for end in pair] for pair in errors]  # a mean may round beyond its interval
        axes.errorbar(
            useful["value"], unsafe["value"], errors[1], errors[0], "o", color=color, elinewidth=0.6, alpha=0.9
        )
        name = {0: "0: frozen", 1: "1: fine-tuned"}.get(alpha, f"{alpha:g}")
        axes.annotate(name, (useful["value"], unsafe["value"]), (7, 5), textcoords="offset points", fontsize=9)
    axes.set_xlabel(f"{utility[0]['label']}  (more is better)")
    axes.set_ylabel(f"{safety[0]['label']}  (less is better)")
    axes.set_title("Safety dial: weights W0 + alpha (W1 - W0); best is right and down", loc="left", fontsize=11)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.3)
    axes.margins(0.12)
    for suffix in ("png", "svg"):
        with atomic_write(Path(path).with_suffix(f".{suffix}")) as file:
            figure.savefig(file, dpi=120, format=suffix)
    plt.close(figure)


def _bars(figure: Any, metrics: Sequence[Mapping[str, Any]]) -> None:
    axes = figure.subplots()
    labels = [f"{m['label']}  ({'should stay' if m['wanted'] == 'stays' else m['wanted']})" for m in metrics]
    for offset, side, color, name in ((-0.2, "frozen", FROZEN, "frozen"), (0.2, "tuned", TUNED, "fine-tuned")):
        values = [m[side]["value"] for m in metrics]
        errors = [
            [max(0.0, m[side]["value"] - m[side]["low"]) for m in metrics],
            [max(0.0, m[side]["high"] - m[side]["value"]) for m in metrics],
        ]
        places = [i + offset for i in range(len(metrics))]
        axes.barh(places, values, 0.38, color=color, label=name, xerr=errors, error_kw={"elinewidth": 1})
        for place, value, high in zip(places, values, [m[side]["high"] for m in metrics], strict=True):
            axes.text(max(value, high) + 0.01, place, f"{value:.2f}", va="center", fontsize=8)
    axes.set_yticks(range(len(metrics)), labels, fontsize=9)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.12)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncol=2, frameon=False)
    axes.set_title("Before and after fine-tuning, held-out samples, 95 % intervals", loc="left", fontsize=11)


def _examples(figure: Any, cases: Sequence[Mapping[str, Any]], held_out: Any) -> None:
    # caption, what the frozen model finds, a gap, what the fine-tuned one finds
    widths = [2.8] + [1] * BEST + [0.15] + [1] * BEST
    grid = figure.subplots(len(cases), len(widths), width_ratios=widths, squeeze=False)
    for line, case in zip(grid, cases, strict=True):
        line[0].text(0, 0.5, case["unsafe_text"], va="center", fontsize=9, wrap=True)
        for axes in (line[0], line[1 + BEST]):
            axes.axis("off")
        for side, first in (("frozen", 1), ("tuned", 2 + BEST)):
            for axes, found in zip(line[first:], case[side]["found"][:BEST], strict=False):
                _framed(axes, found, held_out)
    grid[0, 0].set_title("unsafe caption", loc="left", fontsize=10)
    grid[0, 1].set_title("the frozen model finds", loc="left", fontsize=10)
    grid[0, 2 + BEST].set_title("the fine-tuned model finds", loc="left", fontsize=10)
    figure.supxlabel("best images of the gallery; red frame: unsafe, green frame: safe", fontsize=9)


def _framed(axes: Any, found: Mapping[str, Any], held_out: Any) -> None:
    """Draws an image of the gallery in the color of its kind."""
    images = held_out.unsafe_images if found["side"] == "unsafe" else held_out.safe_images
    axes.imshow(images[found["row"]])
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set(color=UNSAFE if found["kind"] == "unsafe" else SAFE, linewidth=2.5)
