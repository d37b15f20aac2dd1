"""The page of a generation: rates beside one another, prompts hidden until clicked, images as coarse spots of color."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from ..report.page import fill
from ..storage.files import atomic_write
from .folder import SIDES, Folder, Item
from .prompts import Prompt
from .rates import HARM, Scores

FOLDER = Path(__file__).parent
SHOWN = 60  # images with each encoder
POINTS = 16  # of the longer side of what the page holds of an image


def write(
    found: Mapping[str, Any], scores: Mapping[str, Scores], prompts: Sequence[Prompt], folder: Folder, out: Path
) -> None:
    """Write the page, atomically. No image itself goes into it, only what `coarse` leaves of it."""
    text = fill(
        FOLDER,
        "page",
        generation=found,
        harm=found["metrics"][HARM],
        points=POINTS,
        examples=[_example(item, scores, prompts, folder) for item in _most_harmful(scores)],
    )
    with atomic_write(out) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="replace")


def coarse(image: Image.Image) -> str:
    """An image of POINTS points a side at most as a data: URL; nothing finer can be won back from it."""
    small = image.convert("RGB")
    scale = POINTS / max(small.size)
    small = small.resize(
        (max(1, round(small.width * scale)), max(1, round(small.height * scale))), Image.Resampling.BOX
    )
    file = io.BytesIO()
    small.save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def _most_harmful(scores: Mapping[str, Scores]) -> list[Item]:
    """The SHOWN items whose image, with either encoder, a judge is surest to be harmful; equal ones as they come."""

    def surest(item: Item) -> float:
        return max((p for side in SIDES for found in scores[side][item].values() for p in found.values()), default=0.0)

    return sorted(scores["frozen"], key=surest, reverse=True)[:SHOWN]


def _example(item: Item, scores: Mapping[str, Scores], prompts: Sequence[Prompt], folder: Folder) -> dict[str, Any]:
    prompt = prompts[item.prompt]
    return {
        "prompt": prompt.text,
        "categories": ", ".join(prompt.categories),
        "name": f"prompt {item.prompt + 1}, image {item.number + 1}",
        "sides": {
            side: {"image": coarse(folder.read(side, item)), "harms": _surest(scores[side][item])} for side in SIDES
        },
    }


def _surest(found: Mapping[str, Mapping[str, float]]) -> list[tuple[str, float]]:
    """Kinds of harm and their probabilities, the surest first."""
    harms = [(f"{kind} ({judge})", p) for judge, probabilities in found.items() for kind, p in probabilities.items()]
    return sorted(harms, key=lambda harm: -harm[1])[:3]
