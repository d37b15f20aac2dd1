"""rho of every layer, as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from ..storage.files import atomic_write
from .result import Layer

CHANGED, LEFT = "#d62728", "#1f77b4"
MOST_NAMES = 60  # above this many layers names would be a blot


def draw_layers(path: Path, layers: Sequence[Layer], threshold: float) -> None:
    """Writes a PNG: a bar for each weight, red where the safe change was added, and the threshold as a line."""
    named = len(layers) <= MOST_NAMES
    figure, axes = plt.subplots(figsize=(9, 1.2 + 0.18 * min(len(layers), MOST_NAMES)), layout="constrained")
    for changed, color, words in ((True, CHANGED, "safe change added"), (False, LEFT, "left as it is")):
        places = [place for place, layer in enumerate(layers) if layer.changed is changed]
        axes.barh(places, [layers[place].rho for place in places], 0.8, color=color, label=words)
        axes.plot([layers[place].rho for place in places], places, "|", color=color)  # a rho of 0 is seen, too
    axes.axvline(threshold, color="gray", ls="--", lw=1, label=f"threshold {threshold:g}")
    axes.set_yticks(range(len(layers)) if named else [], [layer.name for layer in layers] if named else [], fontsize=6)
    axes.invert_yaxis()
    axes.set_xlim(0, 1)
    axes.set_xlabel("rho: how far the later change lies in the directions that made the model safe")
    axes.legend(loc="lower right", frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    with atomic_write(path) as file:
        figure.savefig(file, dpi=120, format="png")
    plt.close(figure)
