"""Pictures of what changed, for people who would rather look than read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
import torch
import torch.nn.functional as F
from torch import Tensor

from .objectives import QuadrupletEmbeddings
from .ops import nearest_safe

matplotlib.use("Agg")
import matplotlib.pyplot as plt

FROZEN, TUNED = "#8c8c8c", "#1f77b4"
UNSAFE, SAFE = "#d62728", "#2ca02c"
EXAMPLES, BEST = 5, 4  # unsafe captions shown, and images found for each


def before_and_after(
    path: str | Path,
    frozen: dict[str, float],
    tuned: dict[str, float],
    rows: dict[str, tuple[str, str]],
    held_out: Any,
    frozen_rows: QuadrupletEmbeddings,
    tuned_rows: QuadrupletEmbeddings,
) -> None:
    """Writes a PNG: the metrics as bars, and what some unsafe captions find in the mixed gallery, before and after.

    Args:
        frozen, tuned: metrics by name; rows: the metrics to show, name -> (label, "falls" | "rises" | "stays").
        held_out: a data set with `unsafe_captions`, `safe_images`, `unsafe_images` (uint8 [N, H, W, 3]).
        frozen_rows, tuned_rows: its embeddings.
    """
    figure = plt.figure(figsize=(12, 4 + 1.1 * EXAMPLES), layout="constrained")
    parts: Any = figure.subfigures(2, 1, height_ratios=[4, 1.1 * EXAMPLES])
    top, bottom = parts
    _bars(top, frozen, tuned, rows)
    _examples(bottom, held_out, frozen_rows, tuned_rows)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _bars(figure: Any, frozen: dict[str, float], tuned: dict[str, float], rows: dict[str, tuple[str, str]]) -> None:
    axes = figure.subplots()
    labels = [f"{label}  ({'should stay' if wanted == 'stays' else wanted})" for label, wanted in rows.values()]
    for offset, values, color, name in ((-0.2, frozen, FROZEN, "frozen"), (0.2, tuned, TUNED, "fine-tuned")):
        heights = [values[key] for key in rows]
        bars = axes.barh([i + offset for i in range(len(rows))], heights, 0.38, color=color, label=name)
        axes.bar_label(bars, fmt="%.2f", padding=3, fontsize=8)
    axes.set_yticks(range(len(rows)), labels, fontsize=9)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.12)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncol=2, frameon=False)
    axes.set_title("Before and after fine-tuning, held-out samples", loc="left", fontsize=11)


def _examples(figure: Any, held_out: Any, frozen_rows: QuadrupletEmbeddings, tuned_rows: QuadrupletEmbeddings) -> None:
    count = len(frozen_rows.safe_text)
    shown = torch.linspace(0, count - 1, EXAMPLES).long()
    # caption, what the frozen model finds, a gap, what the fine-tuned one finds
    grid = figure.subplots(EXAMPLES, 2 * BEST + 2, width_ratios=[2.8] + [1] * BEST + [0.15] + [1] * BEST)
    found = [_best_images(rows, shown) for rows in (frozen_rows, tuned_rows)]
    for i, row in enumerate(shown.tolist()):
        grid[i, 0].text(0, 0.5, held_out.unsafe_captions[row], va="center", fontsize=9, wrap=True)
        for axes in (grid[i, 0], grid[i, 1 + BEST]):
            axes.axis("off")
        for side, first in enumerate((1, 2 + BEST)):
            for axes, index in zip(grid[i, first:], found[side][i].tolist(), strict=False):
                _framed(axes, held_out, index, count)
    grid[0, 0].set_title("unsafe caption", loc="left", fontsize=10)
    grid[0, 1].set_title("the frozen model finds", loc="left", fontsize=10)
    grid[0, 2 + BEST].set_title("the fine-tuned model finds", loc="left", fontsize=10)
    figure.supxlabel("best images of the gallery; red frame: unsafe, green frame: safe", fontsize=9)


def _framed(axes: Any, held_out: Any, index: int, count: int) -> None:
    """Draws image `index` of the gallery (safe images, then unsafe ones) in the color of its side."""
    unsafe = index >= count
    axes.imshow((held_out.unsafe_images if unsafe else held_out.safe_images)[index % count])
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set(color=UNSAFE if unsafe else SAFE, linewidth=2.5)


def _best_images(rows: QuadrupletEmbeddings, shown: Tensor) -> Tensor:
    """[EXAMPLES, BEST] rows of the gallery (safe images, then unsafe ones) for the unsafe texts `shown`."""
    gallery = F.normalize(torch.cat([rows.safe_image, rows.unsafe_image]), dim=-1)
    return nearest_safe(rows.unsafe_text[shown], gallery, BEST).indices
