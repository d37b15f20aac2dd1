"""What a restoration found and made."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from ..models import ClipModel


class Layer(NamedTuple):
    """One weight that the later fine-tuning moved."""

    name: str
    rho: float  # how far the change lies in the directions that made the model safe, 0 to 1
    changed: bool  # whether the safe change was added


@dataclass(frozen=True)
class Restored:
    """What `sf.restore` made; `print` shows the figures before and after.

    Attributes:
        model: the restored model, ready to use.
        add: how much of the safe change was added.
        layers: every weight that the later fine-tuning moved.
        figures: "safe", "later" and "restored" -> figure -> value: "unsafe_rate@10", the mean of the four rates of an
            unsafe item among the first 10, and "zero_shot.SET" of each set of images.
        out: the folder that was written.
    """

    model: ClipModel
    add: float
    layers: tuple[Layer, ...]
    figures: Mapping[str, Mapping[str, float]]
    out: Path

    def __str__(self) -> str:
        names = list(self.figures["safe"])
        lines = [f"{'':10}" + "".join(f"{name:>24}" for name in names)]
        lines += [
            f"{model:10}" + "".join(f"{values[name]:24.3f}" for name in names) for model, values in self.figures.items()
        ]
        count = sum(layer.changed for layer in self.layers)
        lines.append(f"{self.add:.2f} of the safe change added in {count} of {len(self.layers)} changed weights")
        return "\n".join(lines)
