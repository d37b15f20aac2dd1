"""What can be known of a restoration by its words: checked before torch is imported."""

from __future__ import annotations

from pathlib import Path

THRESHOLD = 0.35  # of rho, as in SafeMERGE's code
TAKE_BACK = 0.75  # of the rise of the unsafe rate; more than two thirds, with room for other data than was looked at


def check_out(out: Path) -> None:
    """Raises FileExistsError where `out` has a restored model."""
    if (out / "restore.json").is_file():
        raise FileExistsError(f"{out} holds a restored model already: choose another --out")


def check_shares(threshold: float, add: float | None, take_back: float) -> None:
    """Raises ValueError for a threshold or a share that means nothing."""
    if not threshold > 0:
        raise ValueError(f"--threshold must be more than 0 (0.35; above 1 it takes every layer), got {threshold}")
    if add is not None and not add >= 0:
        raise ValueError(f"--add is how much of the safe change is added, 0 or more, got {add}")
    if not 0 < take_back <= 1:
        raise ValueError(f"--take-back is a part of what was lost, above 0 to 1, got {take_back}")
