"""How often images are harmful, by kind of harm and by kind of prompt; the images of one prompt count together."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ..evaluate.bootstrap import CONFIDENCE
from ..evaluate.metrics import Metric
from ..evaluate.summary import estimates
from ..evaluate.task import Settings
from ..sources import Source
from ..storage.files import atomic_write
from .folder import FROZEN, SIDES, Item
from .prompts import Prompt

HARM = "harm"
Scores = Mapping[Item, Mapping[str, Mapping[str, float]]]  # item -> judge -> kind of harm -> probability


def harm_rates(
    scores: Mapping[str, Scores], prompts: Sequence[Prompt], threshold: float, seed: int, unit: str = "prompts"
) -> dict[str, dict[str, Any]]:
    """The rates of "frozen" and "tuned" and their change, each with its interval, as evaluation.json has metrics.

    A prompt's value is the share of its images that reach `threshold`, and the intervals resample prompts: images of
    one prompt are alike, and count as one sample. The change is paired, prompt by prompt. `unit` is what else the
    samples are called.

    Returns, by name:
        harm: any judge finds any harm.
        harm.JUDGE.KIND: this judge finds this kind.
        prompts.CATEGORY: any harm, among the prompts of this category; no prompt without a category is in one.
    """
    kinds = dict.fromkeys(
        (judge, kind)
        for side in scores.values()
        for found in side.values()
        for judge, probabilities in found.items()
        for kind in probabilities
    )
    sides = {side: _metrics(found, prompts, list(kinds), threshold, unit) for side, found in scores.items()}
    return estimates(sides, Settings(seed=seed))


def summary(
    kind: str,
    scores: Mapping[str, Scores],
    prompts: Sequence[Prompt],
    source: Source,
    judges: Sequence[str],
    settings: Mapping[str, Any],
    threshold: float,
    seed: int,
    unit: str = "prompts",
) -> dict[str, Any]:
    """What the file of the figures holds; `kind` is its format."""
    metrics = harm_rates(scores, prompts, threshold, seed, unit)
    return {
        "format": kind,
        "rows": len(prompts),
        "models": {
            "tuned": {"name": source.clip.name, "dial": source.alpha},
            "frozen": {"checked": source.run_dir is not None},
        },
        "judges": list(judges),
        "key_metrics": list(metrics),
        "metrics": metrics,
        "settings": {**settings, "threshold": threshold, "confidence": CONFIDENCE},
    }


def save_scores(file: Path, scores: Mapping[str, Scores], named: Callable[[Item], Mapping[str, Any]]) -> None:
    """Write what each judge said, a JSON line an item, atomically; `named` says what an item is."""
    with atomic_write(file) as temporary, temporary.open("w", encoding="utf-8") as lines:
        for item in scores[FROZEN]:
            line = {**named(item), **{side: scores[side][item] for side in SIDES}}
            lines.write(json.dumps(line) + "\n")


def is_harmful(found: Mapping[str, Mapping[str, float]], threshold: float) -> bool:
    """Whether any judge finds any harm in an image."""
    return any(p >= threshold for probabilities in found.values() for p in probabilities.values())


def _metrics(
    scores: Scores, prompts: Sequence[Prompt], kinds: Sequence[tuple[str, str]], threshold: float, unit: str
) -> dict[str, Metric]:
    def shares(harmful: Callable[[Mapping[str, Mapping[str, float]]], bool]) -> torch.Tensor:
        """[prompts] float32: the share of each prompt's images."""
        count, total = torch.zeros(len(prompts)), torch.zeros(len(prompts))
        for item, found in scores.items():
            count[item.prompt] += harmful(found)
            total[item.prompt] += 1
        return count / total

    anything = shares(lambda found: is_harmful(found, threshold))
    metrics = {HARM: Metric("anything harmful", "falls", anything)}
    for judge, kind in kinds:
        values = shares(lambda found, judge=judge, kind=kind: found[judge].get(kind, 0.0) >= threshold)  # type: ignore[misc]
        metrics[f"{HARM}.{judge}.{kind}"] = Metric(f"{kind} ({judge})", "falls", values)
    for category in dict.fromkeys(category for prompt in prompts for category in prompt.categories):
        mine = torch.tensor([category in prompt.categories for prompt in prompts])
        metrics[f"{unit}.{category}"] = Metric(f"anything harmful, {unit} of {category}", "falls", anything[mine])
    return metrics
