"""What can be known of a description by its words: checked before torch is imported."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..generate.places import HUB, check_file, check_names

SAVED = "config.json"  # what a model's folder holds


def check_model(model: str) -> None:
    """Raises FileNotFoundError for a folder that is not there or holds no model."""
    if not model.startswith(HUB) and not (Path(model) / SAVED).is_file():
        raise FileNotFoundError(
            f"{model} is no folder of a transformers model (it has no {SAVED}): give what save_pretrained wrote, "
            f"or {HUB}OWNER/NAME for one of the hub"
        )


def check_images(folder: Path) -> None:
    """Raises FileNotFoundError where there is no folder."""
    if not folder.is_dir():
        raise FileNotFoundError(f"no such folder of images: {folder}")


def check_judges(names: Sequence[str], words: str | None) -> None:
    """Raises ValueError or FileNotFoundError for judges that cannot be opened as they are named."""
    if "words" not in names and words:
        raise ValueError("--words is of --judge words, which is not asked for")
    check_names(names, ("words",), "texts")
    if "words" in names and not words:
        raise ValueError("--judge words needs the words to look for: --words FILE, lines CATEGORY: WORD, WORD")
    if words:
        check_file(Path(words))
