"""Values of single samples to figures with intervals: what evaluation.json holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import torch

from ..data.quadruplets import QuadrupletEmbeddings
from ..results import CUTOFFS, UNSAFE_FOUND, UNSAFE_RATE, at, in_first
from ..storage.files import save_json, save_tensors
from . import bootstrap, cases
from .bootstrap import Resampled, rule_of_three
from .geometry import geometry
from .metrics import TO_FROZEN, Labels, Metric, drift, label_combinations
from .task import Settings, Task

# The figures that a reader should see first, in this order, each with its other cutoffs beside it; captions found for
# images follow.
KEY_METRICS = (
    at(UNSAFE_RATE),
    *map(at, UNSAFE_FOUND),
    at("unsafe_text_finds_right_image"),
    at("unsafe_image_finds_right_text"),
    at("S-V.text_to_image"),
    at("S-V.image_to_text"),
    "zero_shot",
    "safe_text_cosine_to_frozen",
    "safe_image_cosine_to_frozen",
    "safe_text_spread_ratio",
    "safe_image_spread_ratio",
    "safe_text_neighbors_kept",
    "safe_image_neighbors_kept",
)


@dataclass
class Measured:
    """The embeddings and metrics of one model."""

    embeddings: QuadrupletEmbeddings | None
    metrics: dict[str, Metric]


def summarize(measured: Mapping[str, Measured], task: Task, settings: Settings) -> dict[str, Any]:
    """Intervals, tables and examples from what "tuned" and, where there, "frozen" gave."""
    embeddings = {name: side.embeddings for name, side in measured.items() if side.embeddings is not None}
    sides = {name: dict(side.metrics) for name, side in measured.items()}
    if "frozen" in embeddings:
        for name in sides:
            sides[name] |= to_frozen(embeddings[name], embeddings["frozen"], task.labels)
    metrics = estimates(sides, settings)
    first = [*KEY_METRICS, *(name for name in metrics if name.startswith("images."))]
    summary: dict[str, Any] = {
        "rows": len(task.quadruplets) if task.quadruplets is not None else 0,
        "key_metrics": [name for name in first if name in metrics],
        "metrics": metrics,
        "safe_unsafe_table": [],
        "examples": [],
        "worst_cases": [],
        "settings": {
            "precision": settings.precision,
            "resamples": settings.resamples,
            "confidence": bootstrap.CONFIDENCE,
            "seed": settings.seed,
        },
    }
    if embeddings:
        assert task.quadruplets is not None
        labels = task.labels
        summary["text_only"] = labels.text_only
        summary["safe_unsafe_table"] = [] if labels.text_only else _by_labels(embeddings, labels, settings)
        summary |= cases.captions(task.quadruplets, embeddings, labels, settings.examples, settings.worst_cases)
        summary["settings"] |= {"data": task.quadruplets.summary.source, "data_hash": task.quadruplets.content_hash()}
    return summary


def to_frozen(embeddings: QuadrupletEmbeddings, frozen: QuadrupletEmbeddings, labels: Labels) -> dict[str, Metric]:
    """How far safe embeddings moved, and whether they keep their geometry."""
    return drift(embeddings, frozen) | geometry(embeddings, frozen, labels.contents)


def estimates(sides: Mapping[str, Mapping[str, Metric]], settings: Settings) -> dict[str, dict[str, Any]]:
    """Each metric's value and interval on each side, and of the paired change where there are two.

    "zero_shot" is the mean over the zero-shot sets, "unsafe_rate@K" the mean of the four rates of finding anything
    unsafe among the first K. A figure that is the same for all samples has the rule of three's interval.
    """
    means = _means(sides["tuned"])
    drawn: dict[str, dict[str, Resampled]] = {}
    for name, metrics in sides.items():
        values = {key: metric.values for key, metric in metrics.items()}
        found = bootstrap.resample(values, settings.resamples, settings.seed)
        averages = {key: bootstrap.average([found[part] for part in mean.parts]) for key, mean in means.items()}
        drawn[name] = averages | found
    described = {key: (mean.like, mean.samples) for key, mean in means.items()}
    described |= {key: (metric, len(metric.values)) for key, metric in sides["tuned"].items()}
    return {key: _entry({n: side[key] for n, side in drawn.items()}, *like) for key, like in described.items()}


class _Mean(NamedTuple):
    """A figure that is the mean of others."""

    parts: list[str]
    like: Metric  # its label and what else there is to say of it, without values
    samples: int


def _means(metrics: Mapping[str, Metric]) -> dict[str, _Mean]:
    """unsafe_rate@K and zero_shot, as far as there is something to take the mean of."""
    means: dict[str, _Mean] = {}
    for k in CUTOFFS:
        parts = [name for family in UNSAFE_FOUND if (name := at(family, k)) in metrics]
        if parts:
            label = f"mean of {len(parts)} searches: anything unsafe {in_first(k)}"
            fewest = min(len(metrics[name].values) for name in parts)  # the searches share their samples
            means[at(UNSAFE_RATE, k)] = _Mean(parts, _like(label, [metrics[name] for name in parts]), fewest)
    sets = [name for name in metrics if name.startswith("zero_shot.")]
    if sets:
        found = [metrics[name] for name in sets]
        label = found[0].label if len(sets) == 1 else f"zero-shot accuracy, mean of {len(sets)} sets"
        means["zero_shot"] = _Mean(sets, _like(label, found), sum(len(metric.values) for metric in found))
    return means


def _like(label: str, parts: Sequence[Metric]) -> Metric:
    chances = [part.chance for part in parts if part.chance is not None]
    chance = fmean(chances) if len(chances) == len(parts) else None
    return parts[0]._replace(label=label, values=torch.empty(0), chance=chance)


def _entry(sides: Mapping[str, Resampled], metric: Metric, samples: int) -> dict[str, Any]:
    """What evaluation.json says of a metric."""
    entry: dict[str, Any] = {"label": metric.label, "wanted": metric.wanted, "unit": metric.unit, "samples": samples}
    if metric.chance is not None:
        entry["chance"] = metric.chance
    found = {name: side.interval() for name, side in sides.items()}
    if "frozen" in sides:
        found["change"] = (sides["tuned"] - sides["frozen"]).interval()
    if metric.unit not in ("cosine", TO_FROZEN):  # the frozen model's to itself is 1 for certain
        lowest, highest = (1.0, metric.last) if metric.unit == "place" else (0.0, 1.0)
        reach = highest - lowest
        for name, estimate in found.items():
            bounds = (-reach, reach) if name == "change" else (lowest, highest)
            found[name] = rule_of_three(estimate, samples, *bounds, reach)
    return entry | found


def _by_labels(
    embeddings: Mapping[str, QuadrupletEmbeddings], labels: Labels, settings: Settings
) -> list[dict[str, Any]]:
    """One entry for each combination of the unsafe side's labels: text and image, safe (0) or unsafe (1)."""
    found = {name: label_combinations(side, embeddings.get("frozen"), labels) for name, side in embeddings.items()}
    table = []
    for text, image in found["tuned"]:
        metrics = estimates({name: combinations[text, image] for name, combinations in found.items()}, settings)
        samples = int(((labels.text_is_unsafe == text) & (labels.image_is_unsafe == image)).sum())
        table.append({"text_is_unsafe": text, "image_is_unsafe": image, "rows": samples, "metrics": metrics})
    return table


def write(evaluation: dict[str, Any], measured: Mapping[str, Measured], out: Path) -> None:
    """evaluation.json, and embeddings-SIDE.safetensors for each side that has quadruplets."""
    evaluation["embeddings"] = {}
    for name, side in measured.items():
        if side.embeddings is not None:
            file = f"embeddings-{name}.safetensors"
            metadata = {"weights_hash": evaluation["models"][name]["weights_hash"]}
            save_tensors(out / file, side.embeddings._asdict(), metadata)
            evaluation["embeddings"][name] = file
    save_json(out / "evaluation.json", evaluation)
