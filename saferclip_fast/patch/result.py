"""What a patch found and made."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ..models import ClipModel
from .places import FEW
from .spectrum import RANKS, Spectrum, of_all

Figures = dict[str, float]


@dataclass(frozen=True)
class Patched:
    """What `sf.patch` made; `print` shows the figures before and after.

    Attributes:
        model: the patched model, ready to use.
        pairs: how many pairs it was made of.
        part: how much of the change was kept.
        figures: "before" and "after" -> figure -> value, on training data: "pairs.unsafe_rate@10" of the pairs' unsafe
            side among replayed safe items, "unsafe_rate@10" of the replayed quadruplets, and "S-V.text_to_image@1",
            "S-V.image_to_text@1", how many of their safe texts and images find their own first.
        spectra: the gradient that the pairs ask for, at every weight.
        seconds: what it took.
        out: the folder that was written.
    """

    model: ClipModel
    pairs: int
    part: float
    figures: Mapping[str, Figures]
    spectra: tuple[Spectrum, ...]
    seconds: float
    out: Path

    def __str__(self) -> str:
        before, after = self.figures["before"], self.figures["after"]
        lines = [f"{'on training data':28}{'before':>8}{'after':>8}"]
        lines += [f"{name:28}{value:8.3f}{after[name]:8.3f}" for name, value in before.items()]
        energy = dict(zip(RANKS, of_all(self.spectra), strict=True))
        lines.append("")
        lines.append(f"the gradient's energy: {energy[1]:.3f} at rank 1, {energy[16]:.3f} at rank 16")
        lines.append(f"{self.part:.2f} of the change kept; {self.pairs} pairs, {self.seconds:.1f} s")
        if self.pairs > FEW:
            lines.append(f"a patch is meant for 1 to {FEW} pairs: with more, train on all data again (saferclip train)")
        return "\n".join(lines)
