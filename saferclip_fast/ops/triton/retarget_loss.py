"""The redirection loss and both gradients in one pass: one program a row, everything of a row in registers.

It reads each embedding and each neighbor once and writes each gradient once, so it is bound by memory and has no use
for tensor cores. Equations: `ops.retarget_loss` and docs/method.md.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .shared import load_row, on_device, row_warps, sum_terms, through_norm, unit_row


@triton.jit
def _softplus(x):
    return tl.maximum(x, 0.0) + tl.log(1.0 + tl.exp(-tl.abs(x)))


@triton.jit(do_not_specialize=["rows"])
def retarget_kernel(
    text, image, frozen_text, frozen_image, bank_text, bank_image, neighbors, neighbor_weights, row_weights,
    row_terms, grad_text, grad_image, rows, k, width, weight_0, weight_1, weight_2, weight_3, beta, margin,
    CURRENT: tl.constexpr, NEED_GRAD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """row_terms [4, rows]: row_weight x term; grad_*: d loss / d text and image, in their dtype."""
    row = tl.program_id(0).to(tl.int64)
    u_t, inverse_t = unit_row(text, row, width, BLOCK)
    u_v, inverse_v = unit_row(image, row, width, BLOCK)
    s_t = tl.zeros([BLOCK], tl.float32)
    s_v = tl.zeros([BLOCK], tl.float32)
    for j in range(k):
        neighbor = tl.load(neighbors + row * k + j)
        w = tl.load(neighbor_weights + row * k + j)
        s_t += w * load_row(bank_text, neighbor, width, BLOCK, tl.float32)
        s_v += w * load_row(bank_image, neighbor, width, BLOCK, tl.float32)
    if CURRENT:
        away_t, away_v = u_v, u_t
    else:
        away_t, _ = unit_row(frozen_image, row, width, BLOCK)
        away_v, _ = unit_row(frozen_text, row, width, BLOCK)
    away_t -= s_v
    away_v -= s_t
    x_t = beta * (tl.sum(u_t * away_t, axis=0) + margin)
    x_v = beta * (tl.sum(u_v * away_v, axis=0) + margin)
    row_weight_0 = tl.load(row_weights + row * 4)
    row_weight_1 = tl.load(row_weights + row * 4 + 1)
    row_weight_2 = tl.load(row_weights + row * 4 + 2)
    row_weight_3 = tl.load(row_weights + row * 4 + 3)
    tl.store(row_terms + row, row_weight_0 * (1.0 - tl.sum(u_t * s_t, axis=0)))
    tl.store(row_terms + rows + row, row_weight_1 * (1.0 - tl.sum(u_v * s_v, axis=0)))
    tl.store(row_terms + 2 * rows + row, row_weight_2 * _softplus(x_t) / beta)
    tl.store(row_terms + 3 * rows + row, row_weight_3 * _softplus(x_v) / beta)
    if NEED_GRAD:
        columns = tl.arange(0, BLOCK)
        g_t = weight_2 * row_weight_2 * tl.sigmoid(x_t) * away_t - weight_0 * row_weight_0 * s_t
        g_v = weight_3 * row_weight_3 * tl.sigmoid(x_v) * away_v - weight_1 * row_weight_1 * s_v
        place = row * width + columns
        tl.store(grad_text + place, through_norm(g_t, u_t, inverse_t), mask=columns < width)
        tl.store(grad_image + place, through_norm(g_v, u_v, inverse_v), mask=columns < width)


def retarget_loss(
    text: Tensor,
    image: Tensor,
    frozen_text: Tensor,
    frozen_image: Tensor,
    bank_text: Tensor,
    bank_image: Tensor,
    neighbors: Tensor,
    neighbor_weights: Tensor,
    row_weights: Tensor,
    weights: list[float],
    beta: float,
    margin: float,
    current_negative: bool,
    need_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The schema of `schemas.SCHEMAS`; float32, bfloat16 or float16, k neighbors a row, any d."""
    rows, width = text.shape
    block = triton.next_power_of_2(width)
    row_terms = text.new_empty((1, 4, rows), dtype=torch.float32)
    grad_text = text.new_empty((rows if need_grad else 0, width))
    grad_image = text.new_empty((rows if need_grad else 0, width))
    matrices = (text, image, frozen_text, frozen_image, bank_text, bank_image, neighbors, neighbor_weights, row_weights)
    with on_device(text):
        if rows:
            retarget_kernel[(rows,)](
                *(matrix.contiguous() for matrix in matrices), row_terms, grad_text, grad_image,
                rows, neighbors.shape[1], width, *weights, beta, margin,
                CURRENT=current_negative, NEED_GRAD=need_grad, BLOCK=block, num_warps=row_warps(block),
            )  # fmt: skip
        loss, terms = sum_terms(row_terms, weights)
    return loss, terms, grad_text, grad_image
