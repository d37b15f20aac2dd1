"""Values of single samples to figures with intervals: what evaluation.json holds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..data.quadruplets import QuadrupletEmbeddings
from ..storage.files import save_json, save_tensors
from . import bootstrap, cases
from .bootstrap import Resampled, rule_of_three
from .metrics import Labels, Metric, drift, label_combinations
from .task import Settings, Task

# The figures that a reader should see first, in this order; captions found for images follow. The unsafe rates come at
# rank 10 first: people look at a page of results, not at its first item.
KEY_METRICS = (
    "unsafe_text_finds_unsafe_image@10",
    "unsafe_image_finds_unsafe_text@10",
    "safe_text_finds_unsafe_image@10",
    "safe_image_finds_unsafe_text@10",
    "unsafe_text_finds_unsafe_image@1",
    "unsafe_text_finds_right_image@1",
    "unsafe_image_finds_unsafe_text@1",
    "unsafe_image_finds_right_text@1",
    "safe_text_finds_unsafe_image@1",
    "safe_image_finds_unsafe_text@1",
    "S-V.text_to_image@1",
    "S-V.image_to_text@1",
    "zero_shot",
    "safe_text_cosine_to_frozen",
    "safe_image_cosine_to_frozen",
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
            sides[name] |= drift(embeddings[name], embeddings["frozen"])
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
        labels = task.labels()
        summary["safe_unsafe_table"] = _by_labels(embeddings, labels, settings)
        summary |= cases.captions(task.quadruplets, embeddings, labels, settings.examples, settings.worst_cases)
        summary["settings"] |= {"data": task.quadruplets.summary.source, "data_hash": task.quadruplets.content_hash()}
    return summary


def estimates(sides: Mapping[str, Mapping[str, Metric]], settings: Settings) -> dict[str, dict[str, Any]]:
    """Each metric's value and interval on each side, and of the paired change where there are two.

    "zero_shot" is the mean over the zero-shot sets. A rate that is the same for all samples has the rule of three's.
    """
    drawn: dict[str, dict[str, Resampled]] = {}
    for name, metrics in sides.items():
        values = {key: metric.values for key, metric in metrics.items()}
        drawn[name] = bootstrap.resample(values, settings.resamples, settings.seed)
        sets = [value for key, value in drawn[name].items() if key.startswith("zero_shot.")]
        if sets:
            drawn[name]["zero_shot"] = bootstrap.average(sets)
    described = {key: (m.label, m.wanted, len(m.values)) for key, m in sides["tuned"].items()}
    if "zero_shot" in drawn["tuned"]:
        sets_of = [entry for key, entry in described.items() if key.startswith("zero_shot.")]
        label = sets_of[0][0] if len(sets_of) == 1 else f"zero-shot accuracy, mean of {len(sets_of)} sets"
        described["zero_shot"] = (label, "stays", sum(entry[2] for entry in sets_of))
    result: dict[str, dict[str, Any]] = {}
    for key, (label, wanted, samples) in described.items():
        entry: dict[str, Any] = {"label": label, "wanted": wanted, "samples": samples}
        found = {name: drawn[name][key].interval() for name in drawn}
        if "frozen" in drawn:
            found["change"] = (drawn["tuned"][key] - drawn["frozen"][key]).interval()
        if not key.endswith("cosine_to_frozen"):
            found = {name: rule_of_three(e, samples, -1.0 if name == "change" else 0.0) for name, e in found.items()}
        result[key] = entry | found
    return result


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
