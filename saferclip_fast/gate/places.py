"""What can be known of a gate by the words that name it: checked before torch is imported."""

from __future__ import annotations

from pathlib import Path

from ..results import GATE_FILE
from ..storage.claim import LOCK

FROZEN, TUNED = "frozen", "tuned"  # folders of a gate


def is_gate(path: Path) -> bool:
    """Whether `path` is a folder that a gate was saved to."""
    return (path / GATE_FILE).is_file()


def check_source(path: Path) -> None:
    """Raises FileNotFoundError where `path` is neither a gate nor a run with a guard."""
    if is_gate(path):
        return
    if not (path / "config.yaml").is_file():
        raise FileNotFoundError(f"{path} is no run (config.yaml) and no gate ({GATE_FILE}): give the folder of one")
    if not (path / "guard.safetensors").is_file():
        raise FileNotFoundError(f"{path} has no guard, which a gate asks: fit one with saferclip guard {path}")


def check_threshold(threshold: float | None) -> None:
    """Raises ValueError for a threshold that is no probability."""
    if threshold is not None and not 0 <= threshold <= 1:
        raise ValueError(
            f"--threshold is a probability, from 0 (every input goes to the tuned model) to 1 (none does), "
            f"got {threshold}"
        )


def check_new(folder: Path) -> None:
    """Raises FileExistsError where `folder` holds files: models there would be replaced."""
    if folder.is_dir() and any(file.name != LOCK for file in folder.iterdir()):
        raise FileExistsError(f"{folder} holds files already, and they may be a model: choose another folder")
