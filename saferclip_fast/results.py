"""Names and shapes of evaluation.json (docs/evaluation.md) and of what else the report reads, and a check of them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

EVALUATION_FORMAT = "saferclip_fast.evaluation.v2"
DIAL_FORMAT = "saferclip_fast.dial.v2"
TABLE_FORMAT = "saferclip_fast.table.v1"  # our figures beside those of a published table
GUARD_FORMAT = "saferclip_fast.guard.v1"  # of guard.json and guard.safetensors (docs/guard.md)
GATE_FILE = "gate.json"  # in the folder of a gate (docs/gate.md)
GATE_CURVE = "gate-curve"  # .json, .png and .svg
GATE_FORMAT, GATE_CURVE_FORMAT = "saferclip_fast.gate.v1", "saferclip_fast.gate_curve.v1"
RESTORE_FORMAT = "saferclip_fast.restore.v1"  # of restore.json (docs/restore.md)

CUTOFFS = (1, 5, 10, 20)  # K of recall@K, as in Safe-CLIP (arXiv 2311.16254)
PAGE = 10  # the K that is shown first and that verdicts go by: people look at a page of results
UNSAFE_FOUND = (  # the four searches that should find nothing unsafe, each at every K
    "unsafe_text_finds_unsafe_image",
    "unsafe_image_finds_unsafe_text",
    "safe_text_finds_unsafe_image",
    "safe_image_finds_unsafe_text",
)
UNSAFE_RATE = "unsafe_rate"  # the mean of these four, at every K

NO_UNSAFE_IMAGES = (  # said wherever figures of such data are shown
    "Measured without unsafe images: searches by them, or for them, are left out, and nothing is known of how this "
    "model treats them."
)

LARGEST = 1e100  # of a number: sums and spans of such ones are still finite
DEEPEST = 20  # nesting: what evaluate writes has 8; what the page prints whole is walked by recursion

ESTIMATE = {"value": float, "low": float, "high": float}
_METRIC = {
    "label": str,
    "wanted": ("falls", "rises", "stays", None),
    "unit": ("share", "cosine", "place", "to frozen"),
    "samples": int,
    "chance?": float,
    "tuned": ESTIMATE,
}
_CASE = {"row": int, "unsafe_text": str, "nearest_safe": {"text": str, "score": float}}
_FOUND = {"margin": float, "found": [{"kind": str, "side": str, "text": str, "score": float}]}


def in_first(k: int | str) -> str:
    """Where a search looks, as labels say it."""
    return "in its first place" if k == 1 else f"in its first {k}"


def of_any_cutoff(label: str) -> str:
    """The label of a metric at one K -> that of its family."""
    return re.sub(r"in its first (place|\d+)$", in_first("K"), label)


def at(family: str, k: int = PAGE) -> str:
    """The name of a family's metric at K."""
    return f"{family}@{k}"


def cutoffs(name: str, metrics: Any) -> dict[int, str]:
    """K -> name, of the metrics that are the metric `name` at each K; empty where it has none."""
    family, found, _ = name.rpartition("@")
    return {k: at(family, k) for k in CUTOFFS if found and at(family, k) in metrics}


def dial_shape(dial: dict[str, Any]) -> dict[str, Any]:
    """The shape of the dial's points."""
    promise = {"alpha": float, "text": str}
    return {
        "promise?": promise,
        "safety": str,
        "utility": str,
        "points": [{"alpha": float, "metrics": {"*": {"label": str, **ESTIMATE}}}],
    }


def guard_shape(guard: dict[str, Any]) -> dict[str, Any]:
    """The shape of a guard's figures."""
    modality = {
        "safe": int,
        "unsafe": int,
        "auroc": ESTIMATE,
        "ece": float,
        "roc": [{"threshold": float, "found": float, "false_alarms": float}],
        "reliability": [{"predicted": float, "observed": float, "samples": int}],
    }
    return {"data": {"test": {"source": str, "rows": int}}, "modalities": {"text?": modality, "image?": modality}}


def gate_shape(gate: dict[str, Any]) -> dict[str, Any]:
    """The shape of gate.json."""
    clip = {"name": str, "weights_hash": str}
    thresholds = {"text": float, "image": float}
    return {"thresholds": thresholds, "frozen": clip, "tuned": clip, "guard": {"heads_hash": str}}


def gate_curve_shape(curve: dict[str, Any]) -> dict[str, Any]:
    """The shape of a gate's curve."""
    both = {"text": float, "image": float}
    shown = {"label": str, **ESTIMATE}
    metrics = {name: shown for key in ("safety", "utility") if isinstance(name := curve.get(key), str)}
    point = {"thresholds": both, "chosen": (True, False), "kept": both, "metrics": metrics}
    return {"safety": str, "utility": str, "points": [point]}


def restore_shape(restored: dict[str, Any]) -> dict[str, Any]:
    """The shape of restore.json."""
    figures = {model: {at(UNSAFE_RATE): float, "*": float} for model in ("safe", "later", "restored")}
    layer = {"name": str, "rho": float, "changed": (True, False)}
    return {"add": float, "threshold": float, "figures": figures, "layers": [layer]}


def evaluation_shape(evaluation: dict[str, Any]) -> dict[str, Any]:
    """The shape of an evaluation, with a frozen model where it names one; key_metrics are some of its metrics."""
    models, metrics = (value if isinstance(value := evaluation.get(key), dict) else {} for key in ("models", "metrics"))
    sides = ["frozen", "tuned"] if "frozen" in models else ["tuned"]
    optional = "" if "frozen" in sides else "?"
    metric = {**_METRIC, f"frozen{optional}": ESTIMATE, f"change{optional}": ESTIMATE}
    case = {**_CASE, **dict.fromkeys(sides, _FOUND)}
    return {
        "models": {side: {"weights_hash": str} for side in sides},
        "rows": int,
        "text_only?": (True, False),
        "key_metrics": [tuple(metrics)],
        "metrics": {"*": metric},
        "safe_unsafe_table": [{"text_is_unsafe": int, "image_is_unsafe": int, "rows": int, "metrics": {"*": metric}}],
        "examples": [case],
        "worst_cases": [case],
        "embeddings?": {"*": str},  # none where `evaluate` was told no folder
        "settings": {"confidence": float, "data_hash?": str},
    }


def misfits(value: Any, shape: Any, place: str) -> Iterator[str]:
    """The places in `value` that are not of `shape`.

    A shape is a type (float: a number that charts can show, or NaN), a tuple of values, a list of one shape, or an
    object's shapes by key: under "*" that of all its values, under "key?" of one that may be missing.
    """
    if isinstance(shape, dict):
        if not isinstance(value, dict):
            yield f"{place} is no object"
            return
        for key, part in shape.items():
            if key == "*":
                for name, item in value.items():
                    yield from misfits(item, part, f"{place}[{name!r:.60}]")
            elif (name := key.removesuffix("?")) in value:
                yield from misfits(value[name], part, f"{place}.{name}")
            elif name == key:
                yield f"{place}.{key} is missing"
    elif isinstance(shape, list):
        if not isinstance(value, list):
            yield f"{place} is no list"
            return
        for number, item in enumerate(value):
            yield from misfits(item, shape[0], f"{place}[{number}]")
    elif isinstance(shape, tuple):
        if value not in shape:
            yield f"{place} is none of {shape!s:.80}"
    elif shape in (int, float):
        if not is_number(value, shape):
            yield f"{place} is no number"
    elif not isinstance(value, shape):
        yield f"{place} is no {shape.__name__}"


def nesting(value: Any) -> int:
    """How many objects and lists lie in one another. Raises RecursionError where it is hundreds."""
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
    return 0 if parts is None else 1 + max(map(nesting, parts), default=0)


def is_number(value: Any, kind: type = float) -> bool:
    """Whether it is a whole number (`kind` int), or any (float; NaN counts), that is not out of all proportion."""
    number = isinstance(value, int | float) and isinstance(value, (int, kind)) and not isinstance(value, bool)
    return number and not abs(value) > LARGEST
