"""The curve of a gate as a picture."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from ..storage.files import atomic_write
from .curve import name_of


def draw_curve(path: str | Path, curve: Mapping[str, Any]) -> None:
    """Writes PATH.png and PATH.svg: what is kept, safety and usefulness, a place for each threshold; up is better."""
    own, *others = curve["points"]
    points = [*others, own]
    lines = {
        "safe items kept bit for bit": [fmean(point["kept"].values()) for point in points],
        "searches with nothing unsafe in their first 10": [
            1 - point["metrics"][curve["safety"]]["value"] for point in points
        ],
        own["metrics"][curve["utility"]]["label"]: [point["metrics"][curve["utility"]]["value"] for point in points],
    }
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    for (name, values), color in zip(lines.items(), ("#2ca02c", "#1f77b4", "#8c8c8c"), strict=True):
        axes.plot(values[:-1], "o-", color=color, label=name)
        axes.plot([len(others)], values[-1:], "D", color=color)
        axes.annotate(f"{values[-1]:.3f}", (len(others), values[-1]), (7, -3), textcoords="offset points", fontsize=8)
    axes.set_xticks(range(len(points)), [name_of(point).replace(", ", "\n") for point in points], fontsize=8)
    axes.set_xlabel("threshold of P(unsafe), of text and image")
    axes.set_ylim(-0.03, 1.03)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.3)
    figure.legend(loc="outside upper center", ncol=3, frameon=False, fontsize=8)
    for suffix in ("png", "svg"):
        with atomic_write(Path(path).with_suffix(f".{suffix}")) as file:
            figure.savefig(file, dpi=120, format=suffix)
    plt.close(figure)
