"""Symmetric InfoNCE of a batch that may be spread over processes, with a mask, in two passes over its logits."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from .checks import check_finite, check_first_order, check_matrix, check_number
from .choice import run

LOGITS_MIB = 256.0


class Exchange(Protocol):
    """What the processes that share a batch tell each other; `runtime.ranks.Share` is one."""

    def sum(self, value: Tensor) -> Tensor:
        """The sum over all processes, without gradient."""

    def maximum(self, value: Tensor) -> Tensor:
        """The largest over all processes, element by element, without gradient."""

    def gather(self, rows: Tensor) -> Tensor:
        """The rows of all processes in order, without gradient."""


def info_nce(
    x: Tensor,
    y: Tensor,
    all_y: Tensor | None = None,
    first: int = 0,
    mask: Tensor | None = None,
    *,
    logit_scale: float = 100.0,
    exchange: Exchange | None = None,
    logits_mib: float = LOGITS_MIB,
    backend: str = "auto",
    check: bool = True,
) -> Tensor:
    """Symmetric InfoNCE of rows x_i with counterparts y_i, or one process's part of it (CLIP, arXiv 2103.00020).

        S_ij = logit_scale x_i . y_j of rows at length 1, i and j over the n rows that `mask` chooses
        loss = (1 / n) sum_i ((log sum_j exp S_ij - S_ii) + (log sum_j exp S_ji - S_ii)) / 2

    A process holds rows first to first + M of the B rows of the batch. It computes its rows of S against all columns,
    [M, B], and the columns' sums meet in an exchange of [B], so no row of x travels. The losses of all processes add
    up to that of the batch. Where y is trained too, the rows of x and [B] log-sum-exps are gathered, and its gradient
    is that of the same loss with the roles changed.

    Args:
        x: [M, d] float64/32, bfloat16 or float16, any scale.
        y: [M, d] counterparts, any scale. Both sides get gradients where they require them.
        all_y: [B, d] counterparts of all processes' rows; default y. Its rows first to first + M are those of y.
        first: the row of the batch that row 0 of x is.
        mask: [B] of zeros and ones (or bool), the rows that count; the others are no negatives either. Default: all.
            Without a chosen row the loss is 0.
        logit_scale: inverse temperature (CLIP's is 100).
        exchange: the processes, where there are several; all of them call this function.
        logits_mib: S is kept for the gradient up to this size, which makes two products of M B d; above it is
            computed again, three. The reference never keeps it.
        backend, check: as in `nearest_safe`.

    Returns:
        The loss, a scalar: float32 (float64 for float64 inputs), differentiable in x and y.

    Raises:
        ValueError: shapes, dtypes, devices or options that do not fit; NaN or Inf, naming tensor and row.
        TypeError, RuntimeError: as `preservation_loss`.
    """
    all_y = y if all_y is None else all_y
    logit_scale = check_number("logit_scale", logit_scale)
    check_first_order("info_nce", x, y)
    if check:
        _check(x, y, all_y, first, mask, exchange)
    if mask is not None:
        mask = mask != 0
    trained = [torch.is_grad_enabled() and side.requires_grad for side in (x, y)]
    work, all_y = len(x) * len(all_y), all_y.detach()
    keep = trained[0] and 4 * work <= logits_mib * 2**20
    with torch.autocast(x.device.type, enabled=False):  # a kernel's inner products keep the precision it chose
        rows, columns, logits = run(
            "info_nce_sums", backend, x, work, x.detach(), all_y, mask, first, logit_scale, keep
        )
        columns = _merged(columns, exchange)
        loss, _ = run(
            "info_nce_loss", backend, x, work, x, all_y, mask, rows, columns, logits, first, logit_scale, trained[0]
        )
        if not trained[1]:
            return loss
        all_x, all_rows = x.detach(), rows[:2]
        if exchange is not None:
            all_x, all_rows = exchange.gather(all_x), exchange.gather(all_rows.T.contiguous()).T.contiguous()
        own = torch.cat([columns[:, first : first + len(y)], rows[2:]])
        of_y = (y, all_x, mask, own, all_rows, logits.new_empty((0, len(all_y))), first, logit_scale, True)
        swapped, _ = run("info_nce_loss", backend, y, work, *of_y)
    return loss + (swapped - swapped.detach())  # the same loss: once its value, both gradients


def _merged(columns: Tensor, exchange: Exchange | None) -> Tensor:
    """(largest, sum) [2, B] of this process's rows -> (largest, log of the sum) over the rows of all."""
    largest, total = columns
    if exchange is not None:
        largest = exchange.maximum(columns[0])
        total = exchange.sum(total * (columns[0] - largest).exp())
    return torch.stack([largest, total.log()])


def _check(x: Tensor, y: Tensor, all_y: Tensor, first: int, mask: Tensor | None, exchange: Exchange | None) -> None:
    check_matrix("x", x)
    check_matrix("y", y, like=("x", x), rows=True)
    check_matrix("all_y", all_y, like=("x", x))
    if not 0 <= first <= first + len(x) <= len(all_y):
        raise ValueError(f"rows {first} to {first + len(x)} are not among the {len(all_y)} rows of all_y")
    if exchange is None and len(all_y) != len(x):
        raise ValueError(
            f"all_y has {len(all_y)} rows but x has {len(x)}: the sums over the rows of other processes need"
            " exchange=..."
        )
    if mask is not None:
        if mask.shape != (len(all_y),):
            raise ValueError(f"mask must have shape [{len(all_y)}], one entry a row of all_y, got {tuple(mask.shape)}")
        if not torch.compiler.is_compiling() and ((mask != 0) & (mask != 1)).any():
            raise ValueError("mask must hold 0 (left out) and 1 (counts) alone: rows have no weights here")
    for name, value in (("x", x), ("y", y), ("all_y", all_y)):
        if name != "all_y" or all_y is not y:
            check_finite(name, value)
