"""Every figure of one model, of two side by side, and along the safety dial.

Retrieval with safe and unsafe items together, recall as Safe-CLIP reports it, zero-shot accuracy, unsafe captions found
for real images, drift; each figure with a bootstrap interval, frozen and tuned model side by side.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ..data.images import ImageRef
from ..data.labeled import ImageDataset
from ..data.quadruplets import QuadrupletEmbeddings
from ..embeddings import embed_images, embed_quadruplets, embed_texts
from ..models import ClipModel
from ..models.dial import mix
from ..results import DIAL_FORMAT, EVALUATION_FORMAT, UNSAFE_FOUND, UNSAFE_RATE, at, cutoffs
from ..storage.files import save_json
from . import bootstrap
from .metrics import Metric, caption_bank_hits, found_first, retrieval
from .promise import DIALS, check_meaning, promise
from .summary import KEY_METRICS, Measured, estimates, summarize, to_frozen, write
from .task import Settings, Task
from .zero_shot import accuracy

ALPHAS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5)


def measure(clip: ClipModel, task: Task, settings: Settings, called: str = "model") -> Measured:
    """Every metric of `task` on one model, a value for each sample. Quadruplets are embedded once and cached.

    called: which model it is, for progress bars.
    """
    loading: dict[str, Any] = {
        "batch_size": settings.batch_size,
        "num_workers": settings.num_workers,
        "precision": settings.precision,
        "progress": settings.progress,
    }
    embeddings: QuadrupletEmbeddings | None = None
    metrics: dict[str, Metric] = {}
    if task.quadruplets is not None:
        dataset = copy.copy(task.quadruplets)
        dataset.transform = clip.preprocess
        embeddings = embed_quadruplets(
            clip, dataset, settings.cache_dir, title=f"embed quadruplets, {called}", **loading
        ).embeddings
        metrics |= retrieval(embeddings, task.labels)
    for images in task.zero_shot:
        metrics[f"zero_shot.{images.name}"] = accuracy(clip, images, task.templates, **loading)
    metrics |= _captions_found(clip, task, loading)
    return Measured(embeddings, metrics)


def _captions_found(clip: ClipModel, task: Task, loading: dict[str, Any]) -> dict[str, Metric]:
    """images.NAME.unsafe_caption: images of a set that find an unsafe caption of the bank first.

    With distractors also images.NAME.found_by_unsafe_caption: unsafe captions that find an image of the set first, of
    these and the distractors.
    """
    if not task.images:
        return {}
    if task.captions is None:
        raise ValueError("images need a bank of safe and unsafe captions to be matched with")
    texts = {name: value for name, value in loading.items() if name != "num_workers"}
    captions, unsafe = embed_texts(clip, task.captions.texts, name="captions", **texts), task.captions.unsafe

    def embed(name: str, images: Sequence[ImageRef]) -> torch.Tensor:
        return embed_images(clip, ImageDataset(images, [0] * len(images), clip.preprocess), name=name, **loading)[0]

    distractors = embed("distractors", task.distractors) if len(task.distractors) and unsafe.any() else None
    metrics = {}
    for name, images in task.images.items():
        embeddings = embed(name, images)
        hits = caption_bank_hits(embeddings, captions, unsafe)
        label, chance = f"{name} images find an unsafe caption first", float(unsafe.float().mean())
        metrics[f"images.{name}.unsafe_caption"] = Metric(label, "falls", hits, chance=chance)
        if distractors is not None:
            hits = found_first(captions[unsafe], embeddings, distractors)
            label, chance = (
                f"unsafe captions find an image of {name} first",
                len(images) / (len(images) + len(distractors)),
            )
            metrics[f"images.{name}.found_by_unsafe_caption"] = Metric(label, "falls", hits, chance=chance)
    return metrics


Known = dict[str, Measured]  # by weights_hash, all under one task and settings


def evaluate(
    tuned: ClipModel,
    frozen: ClipModel | None,
    task: Task,
    settings: Settings,
    out: str | Path | None = None,
    known: Known | None = None,
) -> dict[str, Any]:
    """Measure `tuned` and, where given, `frozen` beside it; returns the evaluation (docs/evaluation.md has its schema).

    Args:
        out: folder for evaluation.json and the embeddings of the quadruplets; None writes nothing.
        known: what models gave on this task, to be used again; what is measured here is added.

    Raises ValueError where the two do not embed into the same space.
    """
    if frozen is not None:
        check_same_space(tuned, frozen)
    clips = {"tuned": tuned} if frozen is None else {"frozen": frozen, "tuned": tuned}
    measured = {name: measure_once(clip, task, settings, known, name) for name, clip in clips.items()}
    evaluation: dict[str, Any] = {
        "format": EVALUATION_FORMAT,
        "models": {name: {"name": clip.name, "weights_hash": clip.weights_hash} for name, clip in clips.items()},
        **summarize(measured, task, settings),
    }
    if out is not None:
        write(evaluation, measured, Path(out))
    return evaluation


def measure_once(clip: ClipModel, task: Task, settings: Settings, known: Known | None, called: str) -> Measured:
    """What `measure` gives, taken from `known` where a model with these weights was measured before."""
    if known is None:
        return measure(clip, task, settings, called)
    if clip.weights_hash not in known:
        known[clip.weights_hash] = measure(clip, task, settings, called)
    return known[clip.weights_hash]


def check_same_space(tuned: ClipModel, frozen: ClipModel) -> None:
    """Raises ValueError where embeddings of the two cannot be compared."""
    widths = [clip.config["model_cfg"]["embed_dim"] for clip in (tuned, frozen)]
    if widths[0] != widths[1]:
        raise ValueError(
            f"{tuned.name} embeds into {widths[0]} dimensions and the frozen {frozen.name} into {widths[1]}: "
            "the frozen model is the one that the other was tuned from"
        )


def dial_curve(
    tuned: ClipModel,
    frozen: ClipModel,
    task: Task,
    settings: Settings,
    out: str | Path | None = None,
    alphas: Sequence[float] = ALPHAS,
    known: Known | None = None,
    max_loss: float | None = None,
    confidence: float = bootstrap.CONFIDENCE,
) -> dict[str, Any]:
    """The key metrics along the safety dial: weights W0 + alpha (W1 - W0), W0 frozen, W1 tuned.

    out: folder for dial.json; None writes nothing. known: as in `evaluate`. max_loss, confidence: also choose the
    largest dial whose loss of accuracy is bounded (promise.py), among `alphas` and promise.DIALS. Raises ValueError
    where the two are not of one architecture, or `task` has no quadruplets.
    """
    if task.quadruplets is None:
        raise ValueError("the safety dial is drawn over retrieval: give quadruplets (--data SOURCE)")
    if task.quadruplets.text_only:
        raise ValueError("the safety dial needs unsafe images, and these quadruplets have none (data.text_only)")
    known = {} if known is None else known
    start = measure_once(frozen, task, settings, known, "frozen")
    if max_loss is not None:
        check_meaning(max_loss, {n: metric.mean for n, metric in start.metrics.items() if n.startswith("zero_shot.")})
    points: list[dict[str, Any]] = []
    shown: dict[str, Any] = {}
    losses: list[tuple[float, dict[str, torch.Tensor]]] = []
    for alpha in sorted({*alphas, *(DIALS if max_loss is not None else ())}):
        side = measure_once(mix(frozen, tuned, alpha), task, settings, known, f"dial {alpha:g}")
        shown = key_figures(side, start, task, settings)
        points.append({"alpha": alpha, "metrics": shown})
        if alpha > 0:
            losses.append((alpha, _losses(side.metrics, start.metrics)))
    if not any(at(name) in shown for name in UNSAFE_FOUND[:2]):
        raise ValueError("nothing in these quadruplets is labeled unsafe, so there is no safety to draw")
    # safe recall at the first place: at rank 10 it is near 1 for good models and shows no price
    utility = "zero_shot" if "zero_shot" in shown else at("S-V.text_to_image", 1)
    curve: dict[str, Any] = {"format": DIAL_FORMAT, "safety": at(UNSAFE_RATE), "utility": utility, "points": points}
    if max_loss is not None:
        found = promise(losses, max_loss, confidence, settings.seed)
        curve["promise"] = found._asdict() | {"text": str(found)}
    if out is not None:
        save_json(Path(out) / "dial.json", curve)
    return curve


def key_figures(side: Measured, frozen: Measured, task: Task, settings: Settings) -> dict[str, dict[str, Any]]:
    """The key metrics of a model on quadruplets, by name: `label`, `wanted`, `value`, `low`, `high`."""
    assert frozen.embeddings is not None and side.embeddings is not None
    metrics = estimates({"tuned": side.metrics | to_frozen(side.embeddings, frozen.embeddings, task.labels)}, settings)
    names = {name for key in KEY_METRICS for name in (key, *cutoffs(key, metrics).values()) if name in metrics}
    return {
        name: {"label": entry["label"], "wanted": entry["wanted"], **entry["tuned"]}
        for name, entry in metrics.items()
        if name in names or name.startswith("images.")
    }


def _losses(now: Mapping[str, Metric], before: Mapping[str, Metric]) -> dict[str, torch.Tensor]:
    """By zero-shot set: 1 for an image that was right and is wrong, -1 for one that was wrong and is right."""
    return {name: before[name].values - now[name].values for name in now if name.startswith("zero_shot.")}
