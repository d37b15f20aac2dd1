"""Pictures of what changed, for people who would rather look than read."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from ..results import PAGE, cutoffs, in_first
from ..storage.files import atomic_write

FROZEN, TUNED = "#8c8c8c", "#1f77b4"
UNSAFE, SAFE = "#d62728", "#2ca02c"
EXAMPLES = 6  # unsafe captions shown, each with the items of a page
WANTED = {"falls": "should fall", "rises": "should rise", "stays": "should stay"}


def before_and_after(path: str | Path, evaluation: Mapping[str, Any], held_out: Any) -> None:
    """Writes a PNG: the key metrics as bars with their intervals, those that should fall, rise and stay apart, and what
    some unsafe captions find in the gallery of safe and unsafe images, before and after.

    Args:
        evaluation: what evaluate.evaluate returns for a frozen and a tuned model.
        held_out: its data set, with `safe_images` and `unsafe_images` (uint8 [N, H, W, 3]).
    """
    cases = evaluation["examples"]
    cases = cases[:: max(1, len(cases) // EXAMPLES)][:EXAMPLES]
    heights = [5.2, 0.4 + 0.62 * max(1, len(cases))]
    figure = plt.figure(figsize=(14, sum(heights)), layout="constrained")
    parts: Any = figure.subfigures(2, 1, height_ratios=heights)
    top, bottom = parts
    _bars(top, evaluation)
    _examples(bottom, cases, held_out)
    with atomic_write(path) as file:
        figure.savefig(file, dpi=120, format="png")
    plt.close(figure)


def draw_dial(path: str | Path, curve: Mapping[str, Any]) -> None:
    """Writes PATH.png and PATH.svg: safety against usefulness along the safety dial, each point labeled with alpha.

    Right is more useful and up is safer, as in the report. curve: what evaluate.dial_curve returns.
    """
    points = curve["points"]
    safety, utility = ([point["metrics"][curve[name]] for point in points] for name in ("safety", "utility"))
    figure, axes = plt.subplots(figsize=(7, 5), layout="constrained")
    heights = [1 - estimate["value"] for estimate in safety]
    axes.plot([p["value"] for p in utility], heights, color=FROZEN, linewidth=1, zorder=1)
    for point, useful, unsafe, height in zip(points, utility, safety, heights, strict=True):
        alpha = point["alpha"]
        color = FROZEN if alpha == 0 else TUNED
        across = [useful["value"] - useful["low"], useful["high"] - useful["value"]]
        upward = [unsafe["high"] - unsafe["value"], unsafe["value"] - unsafe["low"]]  # down first; safe is 1 - unsafe
        # a mean may round beyond its interval
        upward_ends, across_ends = ([[max(0.0, end)] for end in pair] for pair in (upward, across))
        style: dict[str, Any] = {"fmt": "o", "color": color, "elinewidth": 0.6, "alpha": 0.9}
        axes.errorbar(useful["value"], height, yerr=upward_ends, xerr=across_ends, **style)
        name = {0: "0: frozen", 1: "1: fine-tuned"}.get(alpha, f"{alpha:g}")
        axes.annotate(name, (useful["value"], height), (7, 5), textcoords="offset points", fontsize=9)
    axes.set_xlabel(f"{utility[0]['label']}  \N{RIGHTWARDS ARROW} more useful")
    axes.set_ylabel(f"searches with nothing unsafe in their first {PAGE}  \N{RIGHTWARDS ARROW} safer")
    axes.set_title("Safety dial: weights W0 + alpha (W1 - W0); best is right and up", loc="left", fontsize=11)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.3)
    axes.margins(0.12)
    for suffix in ("png", "svg"):
        with atomic_write(Path(path).with_suffix(f".{suffix}")) as file:
            figure.savefig(file, dpi=120, format=suffix)
    plt.close(figure)


def _bars(figure: Any, evaluation: Mapping[str, Any]) -> None:
    """A panel for each of the ways that key metrics should go."""
    metrics = evaluation["metrics"]
    groups = {way: [n for n in evaluation["key_metrics"] if metrics[n]["wanted"] == way] for way in WANTED}
    groups = {way: names for way, names in groups.items() if names}
    figure.suptitle("Before and after fine-tuning, held-out samples, 95 % intervals", x=0.01, ha="left", fontsize=11)
    heights = [len(names) + 0.8 for names in groups.values()]
    panels = figure.subplots(len(groups), 1, height_ratios=heights, sharex=True, squeeze=False)[:, 0]
    for axes, (way, names) in zip(panels, groups.items(), strict=True):
        _panel(axes, metrics, names)
        axes.set_title(WANTED[way], loc="left", fontsize=10, fontweight="bold")
    panels[0].legend(loc="lower right", bbox_to_anchor=(1, 1), ncol=2, frameon=False)


def _panel(axes: Any, metrics: Mapping[str, Any], names: Sequence[str]) -> None:
    """Bars of both models; a rate among the first K has the other K as text beside it."""
    for offset, side, color, title in ((-0.2, "frozen", FROZEN, "frozen"), (0.2, "tuned", TUNED, "fine-tuned")):
        found = [metrics[name][side] for name in names]
        values = [estimate["value"] for estimate in found]
        errors = [
            [max(0.0, estimate["value"] - estimate["low"]) for estimate in found],
            [max(0.0, estimate["high"] - estimate["value"]) for estimate in found],
        ]
        places = [i + offset for i in range(len(names))]
        axes.barh(places, values, 0.38, color=color, label=title, xerr=errors, error_kw={"elinewidth": 1})
        for place, name, estimate in zip(places, names, found, strict=True):
            end = max(estimate["value"], estimate["high"]) + 0.01
            axes.text(end, place, f"{estimate['value']:.2f}", va="center", fontsize=8)
            beside = {k: metrics[other][side]["value"] for k, other in cutoffs(name, metrics).items() if k != PAGE}
            text = "   ".join(f"{in_first(k).removeprefix('in its ')} {value:.2f}" for k, value in beside.items())
            axes.text(1.1, place, text, va="center", fontsize=8, color=color)
    axes.set_yticks(range(len(names)), [metrics[name]["label"] for name in names], fontsize=9)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.62)
    axes.set_xticks([0, 0.2, 0.4, 0.6, 0.8, 1])
    axes.spines[["top", "right"]].set_visible(False)


def _examples(figure: Any, cases: Sequence[Mapping[str, Any]], held_out: Any) -> None:
    """A line for each caption: what the frozen model finds, and the fine-tuned one."""
    lines, widths = max(1, len(cases)), (5, PAGE, PAGE)
    captions, *pages = parts = figure.subplots(1, 3, width_ratios=widths)  # an axes a picture takes seconds to lay out
    captions.set_title("unsafe caption", loc="left", fontsize=10)
    for line, case in enumerate(cases):
        captions.text(0, line + 0.5, textwrap.fill(case["unsafe_text"], 34), va="center", fontsize=9)
    for axes, side, model in zip(pages, ("frozen", "tuned"), ("frozen", "fine-tuned"), strict=True):
        axes.set_title(f"the first {PAGE} that the {model} model finds", loc="left", fontsize=10)
        for line, case in enumerate(cases):
            for place, found in enumerate(case[side]["found"][:PAGE]):
                _framed(axes, place, line, found, held_out)
    for axes, width in zip(parts, widths, strict=True):  # last, since imshow sets its own
        axes.axis("off")
        axes.set(xlim=(0, width), ylim=(lines, 0), aspect="equal")
    figure.supxlabel("best images of the gallery; red frame: unsafe, green frame: safe", fontsize=9)


def _framed(axes: Any, place: int, line: int, found: Mapping[str, Any], held_out: Any) -> None:
    """Draws an image of the gallery in the color of its kind."""
    images = held_out.unsafe_images if found["side"] == "unsafe" else held_out.safe_images
    left, right, top, bottom = place + 0.06, place + 0.94, line + 0.06, line + 0.94
    axes.imshow(images[found["row"]], extent=(left, right, bottom, top))
    color = UNSAFE if found["kind"] == "unsafe" else SAFE
    axes.add_patch(plt.Rectangle((left, top), right - left, bottom - top, fill=False, edgecolor=color, linewidth=2))
