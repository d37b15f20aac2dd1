"""Evaluate a CLIP for safety and usefulness, alone or beside the frozen model it was tuned from.

The command line is __main__.py.

Retrieval with safe and unsafe items together, recall as Safe-CLIP reports it, zero-shot accuracy, unsafe captions found
for real images, drift; each figure with a bootstrap interval, frozen and tuned model side by side.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import bootstrap, dial, examples
from ..bootstrap import Resampled, rule_of_three
from ..data import QuadrupletDataset
from ..data.images import ImageRef
from ..data.labeled import ImageDataset, LabeledImages
from ..embeddings import embed_images, embed_quadruplets, embed_texts
from ..files import save_json, save_tensors
from ..metrics import Labels, Metric, caption_bank_hits, drift, label_combinations, retrieval
from ..models import ClipModel
from ..objectives import QuadrupletEmbeddings
from ..zero_shot import Template, accuracy

FORMAT = "saferclip_fast.evaluation.v1"
DIAL_FORMAT = "saferclip_fast.dial.v1"
ALPHAS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5)

# The figures that a reader should see first, in this order; captions found for images follow.
KEY_METRICS = (
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


class CaptionBank(NamedTuple):
    """Captions that real images are matched with."""

    texts: Sequence[str]
    unsafe: Tensor  # bool [M]


@dataclass
class Task:
    """The data to measure on; every part is optional.

    quadruplets: held-out samples; right: int64 [N], an item is right for a query where these agree (default: each
    sample for itself). zero_shot: classification sets; templates: prompts instead of their own. images: sets of real
    images by name, each matched with `captions`.
    """

    quadruplets: QuadrupletDataset | None = None
    right: Tensor | None = None
    zero_shot: Sequence[LabeledImages] = ()
    templates: Sequence[Template] | None = None
    images: Mapping[str, Sequence[ImageRef]] = field(default_factory=dict)
    captions: CaptionBank | None = None

    def labels(self) -> Labels:
        """Labels of the quadruplets."""
        assert self.quadruplets is not None
        records = self.quadruplets.records
        text, image = ([getattr(r, f"unsafe_{name}_label") for r in records] for name in ("text", "image"))
        right = torch.arange(len(records)) if self.right is None else self.right
        return Labels(right, torch.tensor(text), torch.tensor(image))


@dataclass
class Settings:
    """How to measure: batches, precision, where embeddings are cached, and the bootstrap."""

    cache_dir: str = ".cache/saferclip"
    batch_size: int = 256
    num_workers: int = 0
    precision: str = "fp32"
    resamples: int = bootstrap.RESAMPLES
    seed: int = 0
    examples: int = 100  # unsafe captions listed
    worst_cases: int = 20
    progress: bool = True


@dataclass
class Measured:
    """The embeddings and metrics of one model."""

    rows: QuadrupletEmbeddings | None
    metrics: dict[str, Metric]


def measure(clip: ClipModel, task: Task, settings: Settings) -> Measured:
    """Every metric of `task` on one model, a value for each sample. Quadruplets are embedded once and cached."""
    loading: dict[str, Any] = {
        "batch_size": settings.batch_size,
        "num_workers": settings.num_workers,
        "precision": settings.precision,
        "progress": settings.progress,
    }
    rows: QuadrupletEmbeddings | None = None
    metrics: dict[str, Metric] = {}
    if task.quadruplets is not None:
        dataset = copy.copy(task.quadruplets)
        dataset.transform = clip.preprocess
        rows = embed_quadruplets(clip, dataset, settings.cache_dir, **loading).rows
        metrics |= retrieval(rows, task.labels())
    for images in task.zero_shot:
        metrics[f"zero_shot.{images.name}"] = accuracy(clip, images, task.templates, **loading)
    metrics |= _captions_found(clip, task, loading)
    return Measured(rows, metrics)


def _captions_found(clip: ClipModel, task: Task, loading: dict[str, Any]) -> dict[str, Metric]:
    """images.NAME.unsafe_caption: images of a set that find an unsafe caption of the bank first."""
    if not task.images:
        return {}
    if task.captions is None:
        raise ValueError("images need a bank of safe and unsafe captions to be matched with")
    texts = {name: value for name, value in loading.items() if name != "num_workers"}
    captions = embed_texts(clip, task.captions.texts, name="captions", **texts)
    metrics = {}
    for name, images in task.images.items():
        rows, _ = embed_images(clip, ImageDataset(images, [0] * len(images), clip.preprocess), name=name, **loading)
        hits = caption_bank_hits(rows, captions, task.captions.unsafe)
        metrics[f"images.{name}.unsafe_caption"] = Metric(f"{name} images find an unsafe caption", "falls", hits)
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
    measured = {name: _measure_once(clip, task, settings, known) for name, clip in clips.items()}
    evaluation: dict[str, Any] = {
        "format": FORMAT,
        "models": {name: {"name": clip.name, "weights_hash": clip.weights_hash} for name, clip in clips.items()},
        **summarize(measured, task, settings),
    }
    if out is not None:
        write(evaluation, measured, Path(out))
    return evaluation


def _measure_once(clip: ClipModel, task: Task, settings: Settings, known: Known | None) -> Measured:
    if known is None:
        return measure(clip, task, settings)
    if clip.weights_hash not in known:
        known[clip.weights_hash] = measure(clip, task, settings)
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
) -> dict[str, Any]:
    """The key metrics along the safety dial: weights W0 + alpha (W1 - W0), W0 frozen, W1 tuned.

    out: folder for dial.json; None writes nothing. known: as in `evaluate`. Raises ValueError where the two are not of
    one architecture, or `task` has no quadruplets.
    """
    if task.quadruplets is None:
        raise ValueError("the safety dial is drawn over retrieval: give quadruplets (--data SOURCE)")
    known = {} if known is None else known
    start = _measure_once(frozen, task, settings, known)
    points: list[dict[str, Any]] = []
    shown: dict[str, Any] = {}
    for alpha in alphas:
        side = _measure_once(dial.mix(frozen, tuned, alpha), task, settings, known)
        assert start.rows is not None and side.rows is not None
        metrics = estimates({"tuned": side.metrics | drift(side.rows, start.rows)}, settings)
        shown = {
            name: {"label": entry["label"], "wanted": entry["wanted"], **entry["tuned"]}
            for name, entry in metrics.items()
            if name in KEY_METRICS or name.startswith("images.")
        }
        points.append({"alpha": alpha, "metrics": shown})
    safety = "unsafe_text_finds_unsafe_image@1"
    if safety not in shown:
        raise ValueError("no text of these quadruplets is labeled unsafe, so there is no safety to draw")
    utility = "zero_shot" if "zero_shot" in shown else "S-V.text_to_image@1"
    curve = {"format": DIAL_FORMAT, "safety": safety, "utility": utility, "points": points}
    if out is not None:
        save_json(Path(out) / "dial.json", curve)
    return curve


def summarize(measured: Mapping[str, Measured], task: Task, settings: Settings) -> dict[str, Any]:
    """Intervals, tables and examples from what "tuned" and, where there, "frozen" gave."""
    rows = {name: side.rows for name, side in measured.items() if side.rows is not None}
    sides = {name: dict(side.metrics) for name, side in measured.items()}
    if "frozen" in rows:
        for name in sides:
            sides[name] |= drift(rows[name], rows["frozen"])
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
    if rows:
        assert task.quadruplets is not None
        labels = task.labels()
        summary["safe_unsafe_table"] = _by_labels(rows, labels, settings)
        summary |= examples.captions(task.quadruplets, rows, labels, settings.examples, settings.worst_cases)
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


def _by_labels(rows: Mapping[str, QuadrupletEmbeddings], labels: Labels, settings: Settings) -> list[dict[str, Any]]:
    """One entry for each combination of the unsafe side's labels: text and image, safe (0) or unsafe (1)."""
    found = {name: label_combinations(side, rows.get("frozen"), labels) for name, side in rows.items()}
    table = []
    for text, image in found["tuned"]:
        metrics = estimates({name: combinations[text, image] for name, combinations in found.items()}, settings)
        samples = int(((labels.unsafe_text == text) & (labels.unsafe_image == image)).sum())
        table.append({"unsafe_text": text, "unsafe_image": image, "rows": samples, "metrics": metrics})
    return table


def write(evaluation: dict[str, Any], measured: Mapping[str, Measured], out: Path) -> None:
    """evaluation.json, and embeddings-SIDE.safetensors for each side that has quadruplets."""
    evaluation["embeddings"] = {}
    for name, side in measured.items():
        if side.rows is not None:
            file = f"embeddings-{name}.safetensors"
            metadata = {"weights_hash": evaluation["models"][name]["weights_hash"]}
            save_tensors(out / file, side.rows._asdict(), metadata)
            evaluation["embeddings"][name] = file
    save_json(out / "evaluation.json", evaluation)


def table(evaluation: Mapping[str, Any], everything: bool = False) -> str:
    """The key metrics, or all of them, as text with intervals."""
    metrics = evaluation["metrics"]
    return _lines([metrics[name] for name in (metrics if everything else evaluation["key_metrics"])])


def comparison(evaluations: Mapping[str, Mapping[str, Any]]) -> str:
    """The key metrics of models that were tuned from one frozen model, side by side, as text with intervals.

    evaluations: of each tuned model by name, on one task.
    """
    first = next(iter(evaluations.values()))
    rows = []
    for name in first["key_metrics"]:
        entry = first["metrics"][name]
        tuned = {model: evaluation["metrics"][name]["tuned"] for model, evaluation in evaluations.items()}
        rows.append({"label": entry["label"], "wanted": entry["wanted"], "frozen": entry["frozen"], **tuned})
    return _lines(rows, ("frozen", *evaluations))


def label_tables(evaluation: Mapping[str, Any]) -> str:
    """The unsafe side apart by its labels, a table for each combination that occurs, as text."""
    words = ("safe", "unsafe")
    return "\n\n".join(
        f"{words[part['unsafe_text']]} text, {words[part['unsafe_image']]} image: {part['rows']} rows\n"
        + _lines(list(part["metrics"].values()))
        for part in evaluation["safe_unsafe_table"]
    )


def _lines(entries: Sequence[Mapping[str, Any]], columns: Sequence[str] = ("frozen", "tuned", "change")) -> str:
    columns = [side for side in columns if entries and side in entries[0]]
    width = max((len(entry["label"]) for entry in entries), default=0)
    lines = [f"{'':{width}}" + "".join(f"  {column:21}" for column in columns) + "  wanted"]
    for entry in entries:
        cells = "".join(f"  {_cell(entry[column], signed=column == 'change')}" for column in columns)
        lines.append(f"{entry['label']:{width}}{cells}  {entry['wanted'] or '-'}")
    return "\n".join(lines)


def _cell(estimate: Mapping[str, float], signed: bool) -> str:
    value, low, high = (format(estimate[key], "+.3f" if signed else ".3f") for key in ("value", "low", "high"))
    return f"{value} [{low}, {high}]".ljust(21)
