"""The interface of every objective, and the terms over the rows that a label selects."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..bank import Bank, SafeBank
from ..data.quadruplets import QuadrupletEmbeddings as QuadrupletEmbeddings  # handed on
from ..ops import Neighbors, PreservationOutput, info_nce, preservation_loss
from ..ops.checks import check_labels
from ..runtime.ranks import ALONE, Share


class ObjectiveOutput(NamedTuple):
    """The result of an objective; `neighbors` are those that it used, where it used any."""

    loss: Tensor  # scalar, differentiable
    terms: dict[str, Tensor]  # unweighted, detached
    neighbors: Neighbors | None = None


class Objective(nn.Module):
    """A loss of one batch of quadruplets: a weighted sum of named terms."""

    SHOWN: ClassVar[tuple[str, ...]]  # the terms that a progress bar has room for
    takes_scores: ClassVar[bool] = False  # whether labels may lie between 0 and 1
    needs_neighbors = True  # whether the nearest safe rows of unsafe texts are read

    def attach(self, bank: Bank) -> None:
        """Take what the objective needs of the training set's `bank`, once, before the first batch; here nothing."""

    def forward(
        self,
        current: QuadrupletEmbeddings,
        frozen: QuadrupletEmbeddings,
        bank: SafeBank,
        neighbors: Neighbors | None = None,
        text_is_unsafe: Tensor | None = None,
        image_is_unsafe: Tensor | None = None,
        share: Share = ALONE,
    ) -> ObjectiveOutput:
        """The loss of one batch, or this rank's share of it.

        Args:
            current: what the model being trained gives; frozen: what the frozen model gives, same shapes.
            bank: safe rows; neighbors: precomputed for these rows (the paper), or None to search in the step.
            text_is_unsafe, image_is_unsafe: [B] labels of the unsafe side, 1 unsafe, 0 safe, or between the two where
                `takes_scores`; None means all unsafe.
            share: which rows of a batch that is spread over ranks these are. Loss and terms of all shares add up to
                those of the batch, and so do their gradients.
        """
        raise NotImplementedError


def chosen_weights(defaults: Mapping[str, float], weights: Mapping[str, float] | None) -> dict[str, float]:
    """`weights` over `defaults`. Raises ValueError for a term that does not exist."""
    unknown = set(weights or {}) - set(defaults)
    if unknown:
        raise ValueError(f"weights has unknown terms {sorted(unknown)}; the terms are {', '.join(defaults)}")
    return {**defaults, **(weights or {})}


def label_mask(name: str, labels: Tensor | None, like: Tensor, check: bool = False) -> Tensor:
    """[B] float32 on the device of `like` [B, d]: 1 for unsafe rows, 0 for safe ones; None: all are unsafe.

    Raises ValueError for another shape and, with `check`, for values outside [0, 1].
    """
    if labels is None:
        return torch.ones(len(like), device=like.device)
    return check_labels(name, labels, len(like), like.device, check)


def cosine_distance(x: Tensor, y: Tensor, mask: Tensor, share: Share = ALONE) -> Tensor:
    """Mean of 1 - cos(x, y) over rows weighted by `mask` [B], 0 where it is; x, y [B, d], y constant."""
    return mean(1 - (unit(x) * unit(y.detach())).sum(-1), mask, share)


def shared_info_nce(
    x: Tensor,
    y: Tensor,
    mask: Tensor | None,
    share: Share = ALONE,
    *,
    logit_scale: float = 100.0,
    backend: str = "auto",
    check: bool = False,
) -> Tensor:
    """`info_nce` of x against y [B, d], or this rank's share, among the rows that `mask` [B] selects; None: all."""
    op = functools.partial(info_nce, x, y, logit_scale=logit_scale, backend=backend, check=check)
    if share.whole:
        return op(mask=mask)
    all_y = share.gather(y) if y.requires_grad else share.gather_once(y)
    return op(all_y, share.first, None if mask is None else share.gather(mask), exchange=share)


def preserve(
    text: Tensor,
    image: Tensor,
    frozen_text: Tensor,
    frozen_image: Tensor,
    *,
    weights: Mapping[str, float] | None = None,
    logit_scale: float = 100.0,
    share: Share = ALONE,
    backend: str = "auto",
    check: bool = False,
) -> PreservationOutput:
    """`preservation_loss` of a batch [B, d], or this rank's share of it."""
    matrices = text, image, frozen_text, frozen_image
    op = functools.partial(preservation_loss, *matrices, logit_scale=logit_scale, backend=backend, check=check)
    if share.whole:
        return op(weights=weights)
    weights = {"cos_text": 1.0, "cos_image": 1.0, "nce_text": 1.0, "nce_image": 1.0, **(weights or {})}
    cosines = {name: 0.0 if name.startswith("nce") else weight * share.fraction for name, weight in weights.items()}
    loss, terms = op(weights=cosines)
    terms = {name: term * share.fraction for name, term in terms.items()}
    for name, x, y in (("nce_text", text, frozen_image), ("nce_image", image, frozen_text)):
        if weights[name]:
            term = shared_info_nce(x, y, None, share, logit_scale=logit_scale, backend=backend, check=check)
            loss = loss + weights[name] * term
            terms[name] = term.detach()
    return PreservationOutput(loss, terms)


def mean(values: Tensor, mask: Tensor, share: Share = ALONE) -> Tensor:
    """Mean of `values` [B] weighted by `mask` [B], in [0, 1], or this rank's share of it; 0 where it is 0."""
    mask = mask.to(values.dtype)
    return (values * mask).sum() / share.sum(mask.sum()).clamp(min=1)


def unit(x: Tensor) -> Tensor:
    """Rows of length 1 in float32 (float64 stays); a row of zeros stays zero."""
    return F.normalize(x if x.dtype == torch.float64 else x.float(), dim=-1)
