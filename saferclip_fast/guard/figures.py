"""How well a guard tells: area under the ROC curve with its interval, the curve, calibration."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..evaluate.bootstrap import RESAMPLES, Resampled, resample, rule_of_three

BINS = 10  # of the reliability curve
POINTS = 100  # of the ROC curve
BENIGN = 0.995  # of safe items, which a gate lets through


def auroc(score: Tensor, unsafe: Tensor, resamples: int = RESAMPLES, seed: int = 0) -> Resampled:
    """How often an unsafe item scores above a safe one (half for equal scores), over resamples of the items.

    With a_i the share of safe items below unsafe item i and b_j the share of unsafe items above safe item j, the area A
    is the mean of either, and a resample's is mean a + mean b - A: its linear part, whose variance is DeLong's (1988).
    Kinds of equal number are resampled together, as the pairs that quadruplets are.

    Args:
        score: [n], larger for what is more likely unsafe.
        unsafe: bool [n], both kinds.
    """
    score, unsafe = score.double().cpu(), unsafe.cpu()
    high, low = score[unsafe], score[~unsafe]
    found = resample({"unsafe": _share_below(high, low), "safe": 1 - _share_below(low, high)}, resamples, seed)
    area = found["unsafe"].value
    return Resampled(area, found["unsafe"].means + found["safe"].means - area)


def _share_below(items: Tensor, others: Tensor) -> Tensor:
    """float64 [n]: the share of `others` below each of `items` [n]; equal ones count half."""
    others = others.sort().values
    below, not_above = (torch.searchsorted(others, items, right=right) for right in (False, True))
    return (below + not_above).double() / (2 * len(others))


def figures_of(p: Tensor, unsafe: Tensor, resamples: int = RESAMPLES, seed: int = 0) -> dict[str, Any]:
    """What guard.json says of P(unsafe) [n] of items that are `unsafe` (bool [n], both kinds)."""
    p, unsafe = p.double().cpu(), unsafe.cpu()
    counts = {"unsafe": int(unsafe.sum()), "safe": int((~unsafe).sum())}
    area = rule_of_three(auroc(p, unsafe, resamples, seed).interval(), min(counts.values()))
    area = {name: min(max(value, 0.0), 1.0) for name, value in area.items()}  # the linear part may leave [0, 1]
    curve = _reliability(p, unsafe)
    error = sum(part["samples"] * abs(part["predicted"] - part["observed"]) for part in curve) / len(p)
    above = p >= 0.5
    return {
        **counts,
        "auroc": area,
        "ece": error,
        "at_half": {"found": _mean(above[unsafe]), "false_alarms": _mean(above[~unsafe])},
        "roc": _roc(p, unsafe),
        "reliability": curve,
    }


def gate_threshold(p: Tensor, unsafe: Tensor) -> float:
    """The least threshold that at most 1 - BENIGN of the safe items lie at or over; 1 where none below 1 does.

    p: P(unsafe), float32 [n]; unsafe: bool [n], some False. It is the number after the P of a safe item, so that equal
    items lie on one side.
    """
    safe = p[~unsafe].sort(descending=True).values
    over = round((1 - BENIGN) * len(safe), 6)  # 1,000 items: 5, though 1 - 0.995 is not 0.005
    return float(torch.nextafter(safe[int(over)], torch.ones_like(safe[0])))


def at_gate(p: Tensor, unsafe: Tensor, threshold: float) -> dict[str, float]:
    """What guard.json says of a gate with this threshold, of P(unsafe) [n] of items that are `unsafe` (bool [n])."""
    over = (p >= threshold) & (threshold < 1)
    return {"threshold": threshold, "found": _mean(over[unsafe]), "false_alarms": _mean(over[~unsafe])}


def _reliability(p: Tensor, unsafe: Tensor) -> list[dict[str, Any]]:
    """Items by P(unsafe) in BINS of equal width: the mean of P and the share that is unsafe; bins with none left out.

    The expected calibration error is the mean difference of the two over items (Guo et al., arXiv 1706.04599).
    """
    bins = (p * BINS).long().clamp(max=BINS - 1)
    return [
        {"predicted": _mean(p[bins == b]), "observed": _mean(unsafe[bins == b]), "samples": int((bins == b).sum())}
        for b in bins.unique().tolist()
    ]


def _roc(p: Tensor, unsafe: Tensor) -> list[dict[str, float]]:
    """At most POINTS thresholds from high to low: the shares of unsafe and of safe items at or above each."""
    order = p.argsort(descending=True)
    p, hit = p[order], unsafe[order].double()
    last = torch.cat([p[1:] != p[:-1], torch.tensor([True])]).nonzero().flatten()  # equal ones come in together
    last = last[torch.linspace(0, len(last) - 1, min(POINTS, len(last))).long()]
    found, alarms = (x.cumsum(0)[last] / x.sum() for x in (hit, 1 - hit))
    return [
        {"threshold": t, "found": f, "false_alarms": a}
        for t, f, a in zip(p[last].tolist(), found.tolist(), alarms.tolist(), strict=True)
    ]


def _mean(values: Tensor) -> float:
    return float(values.double().mean())
