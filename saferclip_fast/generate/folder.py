"""The folder of a generation: what was made stays, and what is missing is made when it goes on."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from ..errors import UserError
from ..storage.files import atomic_write, remove_leftovers, save_json

SETTINGS = "settings.json"
SIDES = FROZEN, TUNED = ("frozen", "tuned")


class OtherSettingsError(UserError, ValueError):
    """A folder holds what other settings made."""


class Item(NamedTuple):
    """One of the images of a prompt, both counted from 0."""

    prompt: int
    number: int


class Folder:
    """OUT/SIDE/PROMPT-NUMBER.png, and OUT/settings.json, which says what they were made with."""

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        """Raises OtherSettingsError, naming what differs, where the folder holds images of other settings."""
        self.path = path
        check_settings(path, settings, "images", [path / side for side in SIDES])
        for side in SIDES:
            remove_leftovers(path / side)

    def file(self, side: str, item: Item) -> Path:
        """Where an image lies."""
        return self.path / side / f"{item.prompt + 1:06d}-{item.number + 1}.png"

    def missing(self, side: str, items: Sequence[Item]) -> list[Item]:
        """Those of `items` that are still to be made."""
        return [item for item in items if not self.file(side, item).is_file()]

    def save(self, side: str, item: Item, image: Image.Image) -> None:
        """Write an image, whole or not at all."""
        with atomic_write(self.file(side, item)) as temporary:
            image.save(temporary, "PNG")

    def read(self, side: str, item: Item) -> Image.Image:
        """An image that was made, RGB."""
        with Image.open(self.file(side, item), formats=("PNG",)) as image:
            return image.convert("RGB")


def check_settings(folder: Path, settings: Mapping[str, Any], what: str, made: Sequence[Path]) -> None:
    """Write FOLDER/settings.json, or see that what is there was made with these `settings`.

    Raises OtherSettingsError, naming what differs, also where there is one of `made`, called `what`, and no such file.
    """
    file = folder / SETTINGS
    if file.is_file():
        _compare(file, settings)
        return
    if any(path.exists() for path in made):
        raise OtherSettingsError(
            f"{folder} holds {what} and no {SETTINGS} that says what made them: choose another --out"
        )
    save_json(file, settings)


def _compare(file: Path, settings: Mapping[str, Any]) -> None:
    try:
        then = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(then, dict):
            raise ValueError("it holds no object")
    except (ValueError, RecursionError) as error:
        raise OtherSettingsError(f"{file} is damaged ({error}): choose another --out") from error
    now = json.loads(json.dumps(settings))
    differ = [f"{key}={_shown(then.get(key))}, not {_shown(now[key])}" for key in now if then.get(key) != now[key]]
    if differ:
        raise OtherSettingsError(
            f"{file.parent} was made with {'; '.join(differ)}: repeat those settings to go on, or choose another --out"
        )


def _shown(value: Any) -> str:
    text = str(value)
    return text[:12] if len(text) == 64 else text
