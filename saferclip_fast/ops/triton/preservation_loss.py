"""Preservation: cosine to the frozen rows, and `info_nce`'s two passes against the frozen counterparts."""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from .info_nce import Rows, finished, gradient, of_gradient, scale_row, sums, value
from .shared import on_device, row_warps

# Matrix numbers: 0 text, 1 image, 2 frozen text, 3 frozen image. The counterpart of m is 3 - m.


@triton.jit(do_not_specialize=["rows"])
def rows_kernel(
    text, image, frozen_text, frozen_image, scaled, inverse, inverse_scaled, cosines, rows, width, BLOCK: tl.constexpr,
):  # fmt: skip
    """What `Rows` holds of all four, [4, B, d] and [4, B], and cosines [2, B] of trained and frozen rows."""
    row = tl.program_id(0).to(tl.int64)
    t = scale_row(text, row, width, scaled, inverse, inverse_scaled, row, BLOCK)
    v = scale_row(image, row, width, scaled, inverse, inverse_scaled, rows + row, BLOCK)
    frozen_t = scale_row(frozen_text, row, width, scaled, inverse, inverse_scaled, 2 * rows + row, BLOCK)
    frozen_v = scale_row(frozen_image, row, width, scaled, inverse, inverse_scaled, 3 * rows + row, BLOCK)
    tl.store(cosines + row, tl.sum(t * frozen_t, axis=0))
    tl.store(cosines + rows + row, tl.sum(v * frozen_v, axis=0))


def preservation_loss(
    text: Tensor,
    image: Tensor,
    frozen_text: Tensor,
    frozen_image: Tensor,
    weights: list[float],
    logit_scale: float,
    need_grad: bool,
    logits_mib: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The schema of `schemas.SCHEMAS`; float32, bfloat16 or float16 (where they differ, in the wider one), any d."""
    given = [matrix.contiguous() for matrix in (text, image, frozen_text, frozen_image)]
    batch, width = text.shape
    block = triton.next_power_of_2(width)
    dtype = functools.reduce(torch.promote_types, (matrix.dtype for matrix in given))
    scaled = text.new_empty((4, batch, width), dtype=dtype)
    inverse, inverse_scaled = text.new_empty((2, 4, batch), dtype=torch.float32)
    cosines = text.new_empty((2, batch), dtype=torch.float32)
    terms = cosines.new_zeros(4)
    gradients = [text.new_empty((batch if need_grad else 0, width)) for _ in range(2)]
    kept = batch if need_grad and 4 * batch * batch <= logits_mib * 2**20 else 0
    with on_device(text):
        rows_kernel[(batch,)](
            *given, scaled, inverse, inverse_scaled, cosines, batch, width, BLOCK=block, num_warps=row_warps(block)
        )
        terms[:2] = (1 - cosines).mean(1)
        matrices = [Rows(*parts) for parts in zip(scaled, inverse, inverse_scaled, strict=True)]
        logits = cosines.new_empty((kept, batch))  # of one term at a time
        for side in range(2):
            x, y, own = matrices[side], matrices[3 - side], matrices[2 + side]
            cosine, weight = weights[side] / batch, weights[2 + side]
            share = cosines.new_zeros(())
            if weight != 0:
                rows, columns = sums(x, y, None, 0, logit_scale, logits)
                columns[1].log_()
                terms[2 + side], count = value(None, rows, columns, 0)
                share = weight * of_gradient(logit_scale, count)
            if not need_grad:
                continue
            finish = finished(x, gradients[side], share, own, cosine)
            if weight != 0:
                gradient(x, y, None, rows, columns, 0, logit_scale, logits, finish)
            else:
                finish(cosines.new_zeros((batch, width)), 0)
    grad_text, grad_image = gradients
    # term by term: a tensor of the weights would be a copy from the host, which waits and ends a graph's capture
    loss = sum((weight * term for weight, term in zip(weights, terms.unbind(), strict=True)), terms.new_zeros(()))
    return loss, terms, grad_text, grad_image
