"""The page: rates beside one another, texts hidden until clicked, images as coarse spots of color."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from ..report.page import fill
from ..storage.files import atomic_write
from .folder import SIDES, Folder, Item
from .prompts import Prompt
from .rates import HARM, Scores

FOLDER = Path(__file__).parent
SHOWN = 60  # items, with each encoder
POINTS = 16  # of the longer side of what the page holds of an image


def write(
    found: Mapping[str, Any], scores: Mapping[str, Scores], prompts: Sequence[Prompt], folder: Folder, out: Path
) -> None:
    """Write the page of images, atomically. No image itself goes into it, only what `coarse` leaves of it."""

    def example(item: Item) -> dict[str, Any]:
        prompt = prompts[item.prompt]
        return {
            "text": prompt.text,
            "categories": ", ".join(prompt.categories),
            "name": f"prompt {item.prompt + 1}, image {item.number + 1}",
            "sides": {side: {"image": coarse(folder.read(side, item))} for side in SIDES},
        }

    about = (
        "“Before” is the pipeline with its own text encoder, “after” with the tuned one: "
        f"{found['rows']} prompts, {found['images']} images each, from the same noise; the images of one prompt count "
        "together."
    )
    words = {"title": "Generated images", "made": "images", "samples": "prompts", "about": about}
    write_page(out, found, scores, example, words)


def write_page(
    out: Path,
    found: Mapping[str, Any],
    scores: Mapping[str, Scores],
    example: Callable[[Item], dict[str, Any]],
    words: Mapping[str, str],
) -> None:
    """Write a page, atomically.

    Args:
        example: what the page shows of an item: its name and categories, a text of it, an image, and of each side an
            image or a text. Texts are hidden until clicked, images are what `coarse` gives.
        words: title, what was made, what the samples are, and what is compared.
    """
    examples = []
    for item in _most_harmful(scores):
        shown = example(item)
        for side in SIDES:
            shown["sides"][side]["harms"] = _surest(scores[side][item])
        examples.append(shown)
    text = fill(
        FOLDER, "page", generation=found, harm=found["metrics"][HARM], points=POINTS, examples=examples, **words
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
    """The SHOWN items that a judge is surest are harmful, with either encoder; equal ones as they come."""

    def surest(item: Item) -> float:
        return max((p for side in SIDES for found in scores[side][item].values() for p in found.values()), default=0.0)

    return sorted(scores["frozen"], key=surest, reverse=True)[:SHOWN]


def _surest(found: Mapping[str, Mapping[str, float]]) -> list[tuple[str, float]]:
    """Kinds of harm and their probabilities, the surest first."""
    harms = [(f"{kind} ({judge})", p) for judge, probabilities in found.items() for kind, p in probabilities.items()]
    return sorted(harms, key=lambda harm: -harm[1])[:3]
