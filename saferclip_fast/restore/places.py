"""What can be known of a restoration by its words: checked before torch is imported."""

from __future__ import annotations

import math
from pathlib import Path

from ..storage.claim import LOCK

THRESHOLD = 0.35  # of rho, as in SafeMERGE's code
TAKE_BACK = 0.75  # of the rise of the unsafe rate; more than two thirds, with room for other data than was looked at


def check_out(out: Path) -> None:
    """Raises FileExistsError where `out` holds files: it may be the later model's own folder, or the run's."""
    if out.is_dir() and any(file.name != LOCK for file in out.iterdir()):
        raise FileExistsError(f"{out} holds files already, and a model there would be replaced: choose another --out")


def check_shares(threshold: float, add: float | None, take_back: float) -> None:
    """Raises ValueError for a threshold or a share that means nothing."""
    if not threshold > 0:
        raise ValueError(f"--threshold must be more than 0 (0.35; above 1 it takes every layer), got {threshold}")
    if add is not None and not 0 <= add < math.inf:
        raise ValueError(f"--add is how much of the safe change is added, a finite number of 0 or more, got {add}")
    if not 0 < take_back <= 1:
        raise ValueError(f"--take-back is a part of what was lost, above 0 to 1, got {take_back}")
