"""What every objective takes and gives, and the terms over the rows that a label selects."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..bank import SafeBank
from ..ops import Neighbors
from ..ops.checks import check_labels


class QuadrupletEmbeddings(NamedTuple):
    """Embeddings of a batch of quadruplets, each [B, d]; row i of all four is one sample."""

    safe_text: Tensor
    safe_image: Tensor
    unsafe_text: Tensor
    unsafe_image: Tensor


class ObjectiveOutput(NamedTuple):
    loss: Tensor  # scalar, differentiable
    terms: dict[str, Tensor]  # unweighted, detached
    neighbors: Neighbors | None = None


class Objective(nn.Module):
    """A loss of one batch of quadruplets: a weighted sum of named terms."""

    SHOWN: ClassVar[tuple[str, ...]]  # the terms that a progress bar has room for

    def forward(
        self,
        current: QuadrupletEmbeddings,
        frozen: QuadrupletEmbeddings,
        bank: SafeBank,
        neighbors: Neighbors | None = None,
        unsafe_text: Tensor | None = None,
        unsafe_image: Tensor | None = None,
    ) -> ObjectiveOutput:
        """The loss of one batch.

        Args:
            current: what the model being trained gives; frozen: what the frozen model gives, same shapes.
            bank: safe rows; neighbors: precomputed for these rows (the paper), or None to search in the step.
            unsafe_text, unsafe_image: [B] labels of the unsafe side, 1 unsafe, 0 safe; None means all unsafe.
        """
        raise NotImplementedError


def chosen_weights(defaults: Mapping[str, float], weights: Mapping[str, float] | None) -> dict[str, float]:
    """`weights` over `defaults`. Raises ValueError for a term that does not exist."""
    unknown = set(weights or {}) - set(defaults)
    if unknown:
        raise ValueError(f"weights has unknown terms {sorted(unknown)}; the terms are {', '.join(defaults)}")
    return {**defaults, **(weights or {})}


def label_rows(name: str, labels: Tensor | None, like: Tensor) -> Tensor:
    """[B] float32 on the device of `like` [B, d]: 1 for unsafe rows, 0 for safe ones; None: all are unsafe."""
    if labels is None:
        return torch.ones(len(like), device=like.device)
    return check_labels(name, labels, len(like), like.device)


def cosine_distance(x: Tensor, y: Tensor, rows: Tensor) -> Tensor:
    """mean over `rows` (a [B] mask) of 1 - cos(x, y); 0 where there are none. x, y: [B, d], y is a constant."""
    return _mean(1 - (_unit(x) * _unit(y.detach())).sum(-1), rows)


def info_nce(x: Tensor, y: Tensor, rows: Tensor, logit_scale: float) -> Tensor:
    """Symmetric InfoNCE of x against y [B, d] among `rows` (a [B] mask) alone; 0 where there are none.

    (CE(S, diag) + CE(S^T, diag)) / 2 with S = logit_scale x y^T of normalised rows; both sides get gradients. S is
    stored: where y is a constant and all rows count, `preservation_loss` does the same without it.
    """
    logits = logit_scale * _unit(x) @ _unit(y).T
    diagonal = logits.diagonal()
    excluded = rows == 0
    lowest = torch.finfo(logits.dtype).min  # not -inf: a row with no column left must not become NaN
    over_columns = logits.masked_fill(excluded, lowest).logsumexp(1)
    over_rows = logits.masked_fill(excluded.unsqueeze(1), lowest).logsumexp(0)
    return _mean((over_columns + over_rows).where(~excluded, 0) / 2 - diagonal, rows)


def _mean(values: Tensor, rows: Tensor) -> Tensor:
    rows = rows.to(values.dtype)
    return (values * rows).sum() / rows.sum().clamp(min=1)


def _unit(x: Tensor) -> Tensor:
    return F.normalize(x if x.dtype == torch.float64 else x.float(), dim=-1)
