"""What a gate keeps and how safe it is, along its threshold."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from ..config import ConfigError
from ..data.quadruplets import QuadrupletEmbeddings
from ..evaluate import Known, Settings, Task
from ..evaluate.measurement import key_figures, measure_once
from ..evaluate.metrics import Labels
from ..guard.fit import Items
from ..guard.model import MODALITIES
from ..results import GATE_CURVE, GATE_CURVE_FORMAT, UNSAFE_RATE, at
from ..storage.files import save_json
from .model import GatedModel

THRESHOLDS = (0.0, 0.001, 0.01, 0.1, 0.5, 0.9, 0.99, 1.0)
RATE = at(UNSAFE_RATE)


def gate_curve(
    gated: GatedModel,
    task: Task,
    settings: Settings,
    out: str | Path | None = None,
    thresholds: Sequence[float] = THRESHOLDS,
    known: Known | None = None,
) -> dict[str, Any]:
    """What is kept of the frozen model, and the key metrics, at each threshold and at the gate's own.

    Args:
        gated: the gate.
        task: with quadruplets, and zero-shot sets if there are any.
        settings: `cache_dir` must not hold the frozen model's embeddings from batches of another size, which may round
            otherwise, and then would count as changed.
        out: folder for gate-curve.json; None writes nothing.
        thresholds: of texts and images alike, from 0 (tuned) to 1 (frozen).
        known: what models gave on this task, to be used again; what is measured here is added.

    Returns:
        `format`, `utility` (the metric of usefulness) and `points`, the gate's own first: `thresholds` of text and
        image, `chosen` (whether they are the gate's own), `kept`: of each modality the share of safe items whose
        embedding equals the frozen model's bit for bit, `sent`: the share of unsafe ones whose embedding does not, and
        `metrics`, as in dial.json.

    Raises ConfigError where there are no quadruplets with images, or nothing in them is unsafe.
    """
    check_task(task)
    known = {} if known is None else known
    start = measure_once(gated.guard.clip, task, settings, known, "frozen")
    assert start.embeddings is not None
    points: list[dict[str, Any]] = []
    for threshold in (None, *sorted(thresholds)):
        gate = gated if threshold is None else gated.at(threshold)
        name = "gate" if threshold is None else f"threshold {threshold:g}"
        side = measure_once(gate, task, settings, known, name)
        assert side.embeddings is not None
        points.append(
            {
                "thresholds": gate.thresholds,
                "chosen": threshold is None,
                **_moved(side.embeddings, start.embeddings, task.labels),
                "metrics": key_figures(side, start, task, settings),
            }
        )
    utility = "zero_shot" if task.zero_shot else at("S-V.text_to_image", 1)
    curve = {"format": GATE_CURVE_FORMAT, "safety": RATE, "utility": utility, "points": points}
    if out is not None:
        save_json(Path(out) / f"{GATE_CURVE}.json", curve)
    return curve


def check_task(task: Task) -> None:
    """Raises ConfigError where a gate cannot be measured on it."""
    if task.quadruplets is None or task.quadruplets.text_only:
        raise ConfigError("a gate is measured on held-out quadruplets with images: name some with --data SOURCE")
    if not (task.labels.text_is_unsafe.any() or task.labels.image_is_unsafe.any()):
        raise ConfigError("nothing in these quadruplets is labeled unsafe, so there is no safety to measure")


def _moved(
    embeddings: QuadrupletEmbeddings, frozen: QuadrupletEmbeddings, labels: Labels
) -> dict[str, dict[str, float]]:
    """`kept` and `sent` of gate_curve; a modality without unsafe items has no `sent`."""
    kept: dict[str, float] = {}
    sent: dict[str, float] = {}
    for modality in MODALITIES:
        label: Tensor = getattr(labels, f"{modality}_is_unsafe")
        now, before = (Items.of(modality, side, label) for side in (embeddings, frozen))
        same = (now.embeddings == before.embeddings).all(-1)
        kept[modality] = float(same[~now.unsafe].double().mean())
        if now.unsafe.any():
            sent[modality] = 1 - float(same[now.unsafe].double().mean())
    return {"kept": kept, "sent": sent}


def table(curve: dict[str, Any]) -> str:
    """A line for each threshold."""
    useful = curve["points"][0]["metrics"][curve["utility"]]["label"]
    lines = [
        f"usefulness: {useful}; unsafe: {curve['points'][0]['metrics'][RATE]['label']}",
        f"{'threshold':>24}  {'safe items kept bit for bit':>28}  {'unsafe items sent':>20}  unsafe  useful",
        f"{'':24}  {'text':>14}{'image':>14}  {'text':>10}{'image':>10}",
    ]
    for point in curve["points"]:
        kept, sent = (
            [f"{point[key][m]:.2%}" if m in point[key] else "" for m in MODALITIES] for key in ("kept", "sent")
        )
        unsafe, use = (point["metrics"][curve[key]]["value"] for key in ("safety", "utility"))
        lines.append(
            f"{name_of(point):>24}  {kept[0]:>14}{kept[1]:>14}  {sent[0]:>10}{sent[1]:>10}  {unsafe:6.3f}  {use:6.3f}"
        )
    return "\n".join(lines)


def name_of(point: dict[str, Any]) -> str:
    """The threshold of a point in words."""
    text, image = (point["thresholds"][name] for name in MODALITIES)
    if point["chosen"]:
        return f"chosen, {text:.3g} and {image:.3g}"
    return {0: "0: tuned", 1: "1: frozen"}.get(text, f"{text:g}")
