"""The texts of a description: a JSON line each as they come, so that what is missing is written when it goes on."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..data.errors import DataError
from ..generate.folder import SIDES, check_settings


class Texts:
    """OUT/SIDE.jsonl, lines {"image", "text"}, and OUT/settings.json, which says what they were written with."""

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        """Raises OtherSettingsError where the folder holds texts of other settings, DataError for a damaged line."""
        self.path = path
        check_settings(path, settings, "texts", [self.file(side) for side in SIDES])
        self.texts = {side: _read(self.file(side)) for side in SIDES}

    def file(self, side: str) -> Path:
        """Where a side's texts lie."""
        return self.path / f"{side}.jsonl"

    def missing(self, side: str, images: Sequence[str]) -> list[int]:
        """The places in `images` of those that still need a text."""
        return [place for place, image in enumerate(images) if image not in self.texts[side]]

    def add(self, side: str, texts: Mapping[str, str]) -> None:
        """Append the texts of some images; they are on the disk afterwards."""
        lines = "".join(json.dumps({"image": image, "text": text}) + "\n" for image, text in texts.items())
        with self.file(side).open("a", encoding="utf-8") as file:
            file.write(lines)
            file.flush()
            os.fsync(file.fileno())
        self.texts[side].update(texts)


def _read(file: Path) -> dict[str, str]:
    """The texts that are whole; a line that a kill tore off at the end is cut away."""
    if not file.is_file():
        return {}
    data = file.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    if len(whole) < len(data):
        os.truncate(file, len(whole))
    found = {}
    for number, line in enumerate(whole.splitlines(), 1):
        try:
            entry = json.loads(line)
            found[str(entry["image"])] = str(entry["text"])
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise DataError(f"{file}, line {number} is damaged: remove the line, its text is written anew") from error
    return found
