"""Whether a run is there, before anything that takes seconds to import."""

from __future__ import annotations

from pathlib import Path


def check_run(folder: Path) -> None:
    """Raises FileNotFoundError where `folder` is no run's."""
    if not (folder / "config.yaml").is_file():
        raise FileNotFoundError(f"{folder} is no run (it has no config.yaml): give the folder that training wrote")
