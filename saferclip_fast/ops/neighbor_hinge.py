"""The hinge over the rows that a search found, and its gradient, in one pass over these rows."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .checks import check_count, check_first_order, check_number
from .choice import run
from .nearest_safe import Neighbors


class HingeOutput(NamedTuple):
    """The loss of neighbor_hinge and each row's part of it."""

    loss: Tensor  # scalar, differentiable in x
    values: Tensor  # [B] unweighted, detached


def neighbor_hinge(
    x: Tensor,
    rows: Tensor,
    neighbors: Neighbors,
    row_weights: Tensor,
    *,
    margin: float = 0.0,
    k: int = 1,
    backend: str = "auto",
) -> HingeOutput:
    """Holds rows below the limits of the queries that they violate most (the rank guard; ours).

        values_i = (1 / k) sum_j max(0, margin + u_i . q_j - limit_j)        loss = sum_i row_weights_i values_i

    with u = x/|x| and j over the rows found for i. A row of `rows` is (q_j, -limit_j, ...) / sqrt(2). Its score, half
    of u . q_j - limit_j, says where the hinge is open: what `nearest_safe` gives for (u, 1, 0) / sqrt(2) in rows of
    length 1, or for a faster form of them (objectives/rank_guard.py). A hinge of exactly 0 is closed, without gradient.

    Args:
        x: [B, d] float64/32, bfloat16 or float16, any scale.
        rows: [N, d + 2] on the device of x.
        neighbors: scores and indices [B, found] of that search, found at most k.
        row_weights: [B] float; 0 leaves a row out.
        margin: added to each violation.
        k: what the sum is divided by.
        backend: as in `nearest_safe`.

    Returns:
        `HingeOutput(loss, values)`, float32 (float64 for float64 inputs).

    Raises:
        ValueError: a margin that is not finite.
        TypeError: a margin that is no number, a k that is no whole number.
        RuntimeError: shapes that do not fit; an index outside `rows`; derivatives as in `preservation_loss`.
    """
    need_grad = torch.is_grad_enabled() and x.requires_grad
    check_count("k", k)
    margin, work = check_number("margin", margin), neighbors.indices.numel()
    check_first_order("neighbor_hinge", x)
    options = (row_weights, margin, k, need_grad)
    loss, values, _ = run("neighbor_hinge", backend, x, work, x, rows, neighbors.indices, neighbors.scores, *options)
    return HingeOutput(loss, values.detach())
