"""What an export from Python returns."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple


class Exported(NamedTuple):
    """One format that was written, read back and compared."""

    folder: Path
    difference: float  # largest, of any coordinate of the unit embeddings
