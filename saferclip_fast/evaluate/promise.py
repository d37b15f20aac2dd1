"""A dial that keeps a promise: the largest whose loss of accuracy is bounded with a given confidence (ours).

Held-out data are a sample, so the best figure on them promises nothing about other data of the same kind. Dials are
tested from the smallest up, each with an error rate of 1 - confidence, until one fails: in this order no correction for
many tests is needed (fixed-sequence testing, Learn then Test, arXiv 2110.01052).

A test bets against "the mean loss is above the limit". With X_i = (1 + loss_i) / 2 in [0, 1], m = (1 + limit) / 2 and
bets b_i that know only the samples before i, in random order,

    K_t = prod_{i <= t} (1 + b_i (m - X_i))

is on average no more than 1 where the mean of X is m or above, so that it ever reaches 1 / a with a probability of at
most a (Waudby-Smith and Ramdas, arXiv 2010.09686). Unlike Hoeffding's bound it profits from losses that are mostly 0.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .places import check_bound

DIALS = tuple(n / 10 for n in range(1, 11))
_LARGEST_BET = 0.75  # of what would be ruin: a single sample never ends the game


class Promise(NamedTuple):
    """No accuracy of `figures` falls by more than `max_loss` at `alpha`, with `confidence`; alpha 0 changes nothing."""

    alpha: float
    max_loss: float
    confidence: float
    figures: tuple[str, ...]
    tested: tuple[tuple[float, float], ...]  # each dial that was tested, with its p-value; the last one may have failed

    def __str__(self) -> str:
        sets = ", ".join(name.removeprefix("zero_shot.") for name in self.figures)
        bound = f"at most {100 * self.max_loss:g} points of zero-shot accuracy on images like those of {sets}"
        if self.alpha == 0:
            return f"Nothing can be promised: no dial is sure enough ({100 * self.confidence:g} %) to lose {bound}."
        return f"Dial {self.alpha:g} loses {bound}, with {100 * self.confidence:g} % confidence."


def promise(
    losses: Sequence[tuple[float, Mapping[str, Tensor]]], max_loss: float, confidence: float, seed: int = 0
) -> Promise:
    """The largest dial whose mean loss is at most `max_loss` in every figure, with `confidence`.

    Only images are asked for that were drawn one by one: searches share a gallery, so that one item can spoil many.

    Args:
        losses: (dial, losses by figure) from the smallest dial up; losses [n] in [-1, 1] of independent samples: 1
            where the frozen model is right and this one is wrong, -1 the other way.
        max_loss: in [0, 1).
        confidence: in (0, 1); the promise is broken with a probability of at most 1 - confidence.
        seed: of the samples' order.

    Raises ValueError for a max_loss or confidence that means nothing.
    """
    check_bound(True, max_loss, confidence)
    kept, tested = 0.0, []
    figures: tuple[str, ...] = ()
    for alpha, found in losses:
        figures = tuple(found)
        # all figures have to pass, each at the same rate: the worst one decides
        p = max(p_value(values, max_loss, 1 - confidence, seed) for values in found.values())
        tested.append((alpha, p))
        if p > 1 - confidence:
            break
        kept = alpha
    return Promise(kept, max_loss, confidence, figures, tuple(tested))


def check_meaning(max_loss: float, accuracies: Mapping[str, float]) -> None:
    """Raises ValueError for a bound that even a model without any use would keep, or that there is nothing to bound."""
    if not accuracies:
        raise ValueError("--max-loss bounds the loss of zero-shot accuracy: name sets of images with --images SOURCE")
    worst = min(accuracies, key=accuracies.__getitem__)
    if max_loss >= accuracies[worst] / 2:
        raise ValueError(
            f"--max-loss {max_loss:g} says little: the frozen model's accuracy on {worst.removeprefix('zero_shot.')} "
            f"is {accuracies[worst]:.3f}; allow less than half of it"
        )


def p_value(losses: Tensor, limit: float, error: float, seed: int = 0) -> float:
    """Of the hypothesis that the mean of `losses` [n], each in [-1, 1], is above `limit`; best near `error`."""
    n = len(losses)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    x, m = (1 + losses.double()[order]) / 2, (1 + limit) / 2
    seen = torch.arange(1, n + 1, dtype=torch.float64)
    mean = (0.5 + x.cumsum(0)) / (seen + 1)
    variance = (0.25 + (x - mean).square().cumsum(0)) / (seen + 1)
    before = torch.cat([variance.new_tensor([0.25]), variance[:-1]])
    bets = (2 * math.log(1 / error) / (n * before)).sqrt().clamp(max=_LARGEST_BET / (1 - m))
    wealth = torch.log1p(bets * (m - x)).cumsum(0)
    return min(1.0, math.exp(-float(wealth.max())))
