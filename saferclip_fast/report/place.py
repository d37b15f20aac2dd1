"""Whether a run's folder is there and evaluated, before anything that takes seconds to import."""

from __future__ import annotations

from pathlib import Path


def check_evaluated(folder: Path) -> None:
    """Raises FileNotFoundError where there is no folder, ValueError where it has no evaluation."""
    if (folder / "evaluation.json").is_file():
        return
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is no folder: give that of a run that has been evaluated")
    raise ValueError(
        f"{folder} has no evaluation.json: write it with python -m saferclip_fast.evaluate {folder}, or give the "
        "folder that its --out named"
    )
