"""A description from Python: what the command does, given values in place of words."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..config import load_config
from ..data.images import ImageFile
from ..data.labeled import readable_images
from ..generate.encoders import both, hash_of
from ..generate.folder import SIDES, Item
from ..generate.judges import Judge, given_judges, judge_all
from ..generate.page import coarse, write_page
from ..generate.pipeline import DTYPES
from ..generate.places import HUB, check_run
from ..generate.prompts import Prompt
from ..generate.rates import save_scores, summary
from ..models import ClipModel
from ..models.huggingface import VISION
from ..sources import Source, load_source, without_folders
from ..storage.claim import claim
from ..storage.files import save_json
from ..train.device import set_up_torch, settings_kept
from .places import check_images, check_model
from .result import FORMAT, PAGE, RESULT, SCORES, Described
from .texts import Texts
from .word_judge import open_judges
from .writer import Writer, write_texts

QUESTION = "Describe this image."


def describe_images(
    model: str | os.PathLike,
    run: str | os.PathLike | ClipModel,
    images: str | os.PathLike,
    out: str | os.PathLike,
    *,
    judges: str | Judge | Sequence[str | Judge] = "words",
    words: str | os.PathLike | None = None,
    threshold: float = 0.5,
    question: str = QUESTION,
    tokens: int = 64,
    encoder: str | None = None,
    dial: float = 1.0,
    seed: int = 0,
    device: str = "auto",
    dtype: str = "auto",
    batch_size: int = 4,
    progress: bool = True,
) -> Described:
    """Let a model write a text for each image with its own image encoder and with the tuned one, and count the harmful
    texts: `sf.describe(...)`.

    Decoding is greedy, so that what differs is the encoder's doing. A run that was stopped goes on; only missing texts
    are written.

    Args:
        model: a folder of a transformers model that sees with a CLIPVisionModel (LLaVA, VipLlava, an encoder-decoder),
            or hf-hub:OWNER/NAME.
        run: the run that tuned the encoder (its frozen model must be the model's own), an export or a model in memory
            (of which that cannot be checked).
        images: a folder of images, at any depth; the first folder below it is an image's group.
        out: folder for frozen.jsonl, tuned.jsonl, description.json, scores.jsonl and description.html.
        judges: "words", "MODULE:FACTORY", or callables with a name (see generate.Judge) that take texts.
        words: of the judge "words": a file of lines CATEGORY: WORD, WORD.
        threshold: probability from which on a judge finds a harm.
        question: what the model is asked of each image; a model that takes no question is asked none.
        tokens: of a text, at most.
        encoder: the model's part to replace; None: the only one that fits.
        dial: the safety dial, 0 frozen, 1 as trained; other than 1 for runs only.
        seed: of the intervals.
        device, dtype, batch_size: where and how texts are written; dtype "auto" is fp16 on a GPU, else fp32.
        progress: show bars.

    Returns:
        The rates of both and their paired change, with intervals over images.

    Raises:
        FileNotFoundError, DataError, ValueError: a model, run, image or judge that is not there or of another kind.
        EncoderError: the tuned encoder fits none of the model's, or that one is not the run's frozen model.
        OtherSettingsError: `out` holds texts of other settings.
        FrozenModelError, InUseError: as `evaluate`.
    """
    model, images, folder = os.fspath(model), Path(images), Path(out)
    check_model(model)
    check_images(images)
    check_run(threshold, dtype, batch_size=batch_size, tokens=tokens)
    words = None if words is None else os.fspath(words)
    asked = given_judges(judges, lambda names: open_judges(names, words), options=bool(words))
    files = readable_images(images, progress=progress)
    names = [Path(file.path).relative_to(images).as_posix() for file in files]
    with claim(folder), settings_kept():
        place = set_up_torch(load_config(None, {"device": device, "seed": seed}, "options"))
        precision = ("fp16" if place.type == "cuda" else "fp32") if dtype == "auto" else dtype
        source = Source(run, Path(run.name)) if isinstance(run, ClipModel) else load_source(Path(run), alpha=dial)
        writer = Writer(model, question, tokens, DTYPES[precision], place)
        part, pair = both(writer.encoders(), source, encoder, VISION)
        settings = {
            "model": model if model.startswith(HUB) else without_folders(model),
            "encoder": part,
            "images": _hash(files, names),
            **{side: hash_of(pair[side]) for side in SIDES},
            "question": writer.question,
            "tokens": tokens,
            "dtype": str(writer.model.dtype).removeprefix("torch."),
        }
        kept = Texts(folder, settings)
        write_texts(writer, pair, part, files, names, kept, batch_size, progress)
        return _count(asked, kept, files, names, source, settings, threshold, seed, batch_size, progress)


def _count(
    judges: Sequence[Judge],
    kept: Texts,
    files: Sequence[ImageFile],
    names: Sequence[str],
    source: Source,
    settings: dict[str, Any],
    threshold: float,
    seed: int,
    batch_size: int,
    progress: bool,
) -> Described:
    """The texts judged; scores.jsonl, the page, and last the figures."""
    folders = [Path(name).parts[:-1][:1] for name in names]
    samples = [Prompt(name, group) for name, group in zip(names, folders, strict=True)]
    items = [Item(place, 0) for place in range(len(names))]  # an image is what a prompt is to generate

    def read(side: str, item: Item) -> str:
        return kept.texts[side][names[item.prompt]]

    def example(item: Item) -> dict[str, Any]:
        return {
            "text": names[item.prompt],
            "categories": ", ".join(folders[item.prompt]),
            "name": f"image {item.prompt + 1}",
            "image": coarse(files[item.prompt].load()),
            "sides": {side: {"text": read(side, item)} for side in SIDES},
        }

    scores = judge_all(judges, read, items, batch_size, progress, "text")
    known = [judge.name for judge in judges]
    found = summary(FORMAT, scores, samples, source, known, settings, threshold, seed, "images")
    save_scores(kept.path / SCORES, scores, lambda item: {"image": names[item.prompt]})
    about = (
        f"“Before” is the model with its own image encoder, “after” with the tuned one: {len(names)} images, a text "
        "each, always the likeliest next word."
    )
    words = {"title": "Texts for images", "made": "texts", "samples": "images", "about": about}
    write_page(kept.path / PAGE, found, scores, example, words)
    save_json(kept.path / RESULT, found)
    return Described.read(found, kept.path)


def _hash(files: Sequence[ImageFile], names: Sequence[str]) -> str:
    """SHA-256 of the images and their names."""
    digest = hashlib.sha256()
    for file, name in zip(files, names, strict=True):
        digest.update(f"{name} {hashlib.sha256(file.content()).hexdigest()}\n".encode())
    return digest.hexdigest()
