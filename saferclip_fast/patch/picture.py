"""The energy of the gradient by rank, as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from ..storage.files import atomic_write
from .spectrum import RANKS, Spectrum, of_all

IMAGE, TEXT, ALL = "#1f77b4", "#d62728", "black"


def draw_energy(path: Path, layers: Sequence[Spectrum]) -> None:
    """Writes a PNG: a thin line for each weight, in a color for each encoder, and a thick one for all together."""
    figure, axes = plt.subplots(figsize=(6.5, 4), layout="constrained")
    named = set()
    for layer in layers:
        color, words = (IMAGE, "image encoder") if layer.name.startswith("visual.") else (TEXT, "text encoder")
        axes.plot(RANKS, layer.energy, color=color, lw=0.8, alpha=0.5, label=None if words in named else words)
        named.add(words)
    axes.plot(RANKS, of_all(layers), "o-", color=ALL, lw=2, label="all weights")
    axes.set_xscale("log", base=2)
    axes.set_xticks(RANKS, [str(rank) for rank in RANKS])
    axes.set_ylim(0, 1.02)
    axes.set_xlabel("rank")
    axes.set_ylabel("part of the gradient's energy")
    axes.legend(loc="lower right", frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    with atomic_write(path) as file:
        figure.savefig(file, dpi=120, format="png")
    plt.close(figure)
