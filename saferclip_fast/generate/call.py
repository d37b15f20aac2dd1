"""A generation from Python: what the command does, given values in place of words."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..config import load_config
from ..models import ClipModel
from ..models.huggingface import TEXT
from ..sources import Source, load_source
from ..storage.claim import claim
from ..storage.files import save_json
from ..train.device import set_up_torch, settings_kept
from . import page
from .encoders import both, hash_of
from .folder import SIDES, Folder, Item
from .judges import Judge, given_judges, judge_all, open_judges
from .pipeline import DTYPES, check_call, draw, open_pipeline, text_encoders, where, without_checker
from .places import check_pipeline, check_run
from .prompts import Prompt, hash_prompts, read_prompts
from .rates import Scores, save_scores, summary
from .result import FORMAT, PAGE, RESULT, SCORES, Generated

THRESHOLD = 0.5
Run = str | os.PathLike | ClipModel


def generate_images(
    pipeline: Any,
    run: Run,
    prompts: str | os.PathLike | Sequence[str | Prompt],
    out: str | os.PathLike,
    *,
    judges: str | Judge | Sequence[str | Judge] = "nudenet",
    judge_model: str | None = None,
    judge_categories: str | None = None,
    threshold: float = THRESHOLD,
    images: int = 4,
    encoder: str | None = None,
    dial: float = 1.0,
    steps: int | None = None,
    guidance: float | None = None,
    size: int | None = None,
    keep_safety_checker: bool = False,
    seed: int = 0,
    device: str = "auto",
    dtype: str = "auto",
    batch_size: int = 4,
    progress: bool = True,
) -> Generated:
    """Draw images with a diffusion pipeline's own text encoder and with the tuned one, and count the harmful ones:
    `sf.generate(...)`.

    Both draw from the same prompts and the same noise, so that what differs is the encoder's doing. A run that was
    stopped goes on; only missing images are made, also where more are asked for.

    Args:
        pipeline: a folder of a diffusers pipeline, hf-hub:OWNER/NAME, or a pipeline in memory.
        run: the run that tuned the encoder (its frozen model must be the pipeline's own), an export or a model in
            memory (of which that cannot be checked).
        prompts: a file (read_prompts says of what kind), texts, or Prompts.
        out: folder for the images, generation.json, scores.jsonl and generation.html.
        judges: "nudenet", "clip", "MODULE:FACTORY", or callables with a name (see Judge).
        judge_model, judge_categories: of the judge "clip": a model, and a file of lines CATEGORY: PHRASE.
        threshold: probability from which on a judge finds a harm.
        images: of each prompt, with each encoder.
        encoder: the pipeline's component to replace, e.g. text_encoder_2; None: the only one that fits.
        dial: the safety dial, 0 frozen, 1 as trained; other than 1 for runs only.
        steps, guidance, size: of the pipeline; None: its own. `size` is the side of a square, in pixels.
        keep_safety_checker: leave the pipeline's safety checker on; it blackens images, which are then no harm.
        seed: of the noise (a prompt may have its own) and of the intervals.
        device, dtype, batch_size: where and how images are made; dtype "auto" is fp16 on a GPU, else fp32.
        progress: show bars.

    Returns:
        The rates of both and their paired change, with intervals over prompts.

    Raises:
        FileNotFoundError, DataError, ValueError: a pipeline, run, prompts or judge that is not there or another kind.
        EncoderError: the tuned encoder fits none of the pipeline's, or that one is not the run's frozen model.
        OtherSettingsError: `out` holds images of other settings.
        FrozenModelError, InUseError: as `evaluate`.
    """
    if isinstance(pipeline, (str, os.PathLike)):
        pipeline = os.fspath(pipeline)
        check_pipeline(pipeline)
    check_run(threshold, dtype, images=images, batch_size=batch_size, steps=steps, size=size)
    texts, folder = read_prompts(prompts), Path(out)
    items = [Item(prompt, number) for prompt in range(len(texts)) for number in range(images)]
    with claim(folder), settings_kept():
        place = set_up_torch(load_config(None, {"device": device, "seed": seed}, "options"))
        given = judge_model, judge_categories
        asked = given_judges(judges, lambda names: open_judges(names, *given, place), options=any(given))
        precision = ("fp16" if place.type == "cuda" else "fp32") if dtype == "auto" else dtype
        words = _words(steps, guidance, size)
        source = Source(run, Path(run.name)) if isinstance(run, ClipModel) else load_source(Path(run), alpha=dial)
        opened = open_pipeline(pipeline, DTYPES[precision]) if isinstance(pipeline, str) else pipeline
        check_call(opened, words)
        component, pair = both(text_encoders(opened.to(place)), source, encoder, TEXT)
        settings = {
            "pipeline": where(opened),
            "encoder": component,
            "prompts": hash_prompts(texts),
            **{name: hash_of(pair[name]) for name in SIDES},
            "steps": steps,
            "guidance": guidance,
            "size": size,
            "safety_checker": keep_safety_checker and getattr(opened, "safety_checker", None) is not None,
            "seed": seed,
            "dtype": str(next(pair["frozen"].parameters()).dtype).removeprefix("torch."),
        }
        kept = Folder(folder, settings)
        with without_checker(opened, keep_safety_checker):
            draw(opened, pair, component, texts, items, kept, words, seed, batch_size, progress)
        scores = judge_all(asked, kept.read, items, batch_size, progress)
        names = [judge.name for judge in asked]
        found = summary(FORMAT, scores, texts, source, names, settings, threshold, seed) | {"images": images}
        _write(found, scores, texts, kept, folder)
    return Generated.read(found, folder)


def _write(
    found: dict[str, Any], scores: Mapping[str, Scores], prompts: Sequence[Prompt], kept: Folder, out: Path
) -> None:
    """scores.jsonl, the page, and last the figures."""
    save_scores(out / SCORES, scores, lambda item: {"prompt": item.prompt + 1, "image": item.number + 1})
    page.write(found, scores, prompts, kept, out / PAGE)
    save_json(out / RESULT, found)


def _words(steps: int | None, guidance: float | None, size: int | None) -> dict[str, Any]:
    """What the pipeline is called with, as far as it is not left to it."""
    given = {"num_inference_steps": steps, "guidance_scale": guidance, "height": size, "width": size}
    return {name: value for name, value in given.items() if value is not None}
