"""The hinge over found rows and its gradient: one program a row, which reads the rows that are open, once."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .shared import on_device, row_pointer, row_warps, through_norm, unit_row


@triton.jit(do_not_specialize=["found"])
def hinge_kernel(
    x, rows, indices, scores, row_weights, values, grad, found, width, margin, share, margin_share,
    NEED_GRAD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """values [B]; grad [B, d] in the dtype of x. share = sqrt(2) / k, margin_share = margin / k."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    unit, inverse = unit_row(x, row, width, BLOCK)
    slope = tl.zeros([BLOCK], tl.float32)
    limit = tl.zeros([], tl.float32)
    opened = tl.zeros([], tl.float32)
    for j in range(found):
        if 2.0 * tl.load(scores + row * found + j) + margin > 0.0:
            near = row_pointer(rows, tl.load(indices + row * found + j), width + 2)
            slope += tl.load(near + columns, mask=columns < width, other=0.0).to(tl.float32)
            limit += tl.load(near + width).to(tl.float32)
            opened += 1.0
    tl.store(values + row, share * (tl.sum(unit * slope, axis=0) + limit) + margin_share * opened)
    if NEED_GRAD:
        g = through_norm(share * tl.load(row_weights + row) * slope, unit, inverse)
        tl.store(row_pointer(grad, row, width) + columns, g, mask=columns < width)


def neighbor_hinge(
    x: Tensor,
    rows: Tensor,
    indices: Tensor,
    scores: Tensor,
    row_weights: Tensor,
    margin: float,
    k: int,
    need_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The schema of `schemas.SCHEMAS`; float32, bfloat16 or float16, any d."""
    batch, width = x.shape
    block = triton.next_power_of_2(width)
    values = x.new_empty(batch, dtype=torch.float32)
    grad = x.new_empty((batch if need_grad else 0, width))
    row_weights = row_weights.to(torch.float32)
    tensors = (tensor.contiguous() for tensor in (x, rows, indices, scores, row_weights))
    with on_device(x):
        if batch:
            hinge_kernel[(batch,)](
                *tensors, values, grad, indices.shape[1], width, margin, math.sqrt(2) / k, margin / k,
                NEED_GRAD=need_grad, BLOCK=block, num_warps=row_warps(block),
            )  # fmt: skip
    return (row_weights * values).sum(), values, grad
