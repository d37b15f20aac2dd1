"""Preservation: cosine to the frozen rows and symmetric InfoNCE against the frozen counterparts, B x B never stored.

Shaped like FlashAttention, with no atomics: a program owns a block of rows and streams over the columns.

1. `rows_kernel`: the four matrices as x 2^-e with 1 <= |x 2^-e| < 2 (exact; a product of two cannot overflow), both
   inverse norms, and the cosine terms.
2. `log_sum_kernel`: log-sum-exp of the logits' rows, in four passes: rows and columns of both InfoNCE terms. The
   columns of S are the rows of its transpose, so one kernel serves both. The diagonal is kept apart, so that a row's
   loss (log-sum-exp minus its diagonal logit) and what the softmax leaves to the other columns are both had without
   subtracting two large numbers: near the optimum they are small.
3. `gradient_kernel`: recomputes a tile of S, turns it into D = softmax_rows + softmax_columns - 2 I (on the diagonal,
   minus what is left to the others), and adds D times the columns' rows into a [rows, CHUNK] accumulator. The
   projection (g - (g.u) u) / |x| needs g.u, which is the row sum of D * S, so it is had in the same pass, from the
   same rounded D.

float32 products are IEEE float32, without tensor cores: TF32x3 has nearly exact products but an accumulator that
truncates, which the logit scale of 100 would make visible.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from .configs import GRADIENT, LOG_SUM, tuned
from .shared import (
    LN_2,
    LOG2_E,
    NOTHING,
    dot_tile,
    has_wide_tiles,
    load_row,
    load_tile,
    log_sum_step,
    on_device,
    power_of_two_below,
    row_pointer,
    row_warps,
    rows_per_block,
    sum_terms,
)

EXACT = tl.constexpr("ieee")

# Matrix numbers in the stacked copies: 0 text, 1 image, 2 frozen text, 3 frozen image. The counterpart of m is 3 - m.
# Slabs of `row_terms` [2, 4, rows]: 0 the cosine terms and the InfoNCE terms' row halves, 1 their column halves.


@triton.jit
def _scale_row(matrix, number, row, rows, width, scaled, inverse, inverse_scaled, BLOCK: tl.constexpr):
    """Stores x 2^-e and both inverse norms of one row, and returns the unit row in float32."""
    columns = tl.arange(0, BLOCK)
    wide = load_row(matrix, row, width, BLOCK, tl.float64)
    norm = tl.sqrt(tl.sum(wide * wide, axis=0))
    scale = tl.where(norm > 0, 1.0 / power_of_two_below(norm), 0.0)
    place = number * rows + row
    tl.store(
        scaled + place * width + columns,
        (wide * scale).to(tl.float32).to(scaled.dtype.element_ty),
        mask=columns < width,
    )
    one_over = tl.where(norm > 0, 1.0 / norm, 0.0)
    tl.store(inverse + place, one_over.to(tl.float32))
    tl.store(inverse_scaled + place, tl.where(norm > 0, 1.0 / (norm * scale), 0.0).to(tl.float32))
    return (wide * one_over).to(tl.float32)


@triton.jit(do_not_specialize=["rows"])
def rows_kernel(
    text, image, frozen_text, frozen_image, scaled, inverse, inverse_scaled, cosines, row_terms,
    rows, width, BLOCK: tl.constexpr,
):  # fmt: skip
    """scaled [4, B, d]; inverse = 1/|x|, inverse_scaled = 1/|x 2^-e| [4, B]; cosines [2, B]; slab 0 of row_terms."""
    row = tl.program_id(0).to(tl.int64)
    t = _scale_row(text, 0, row, rows, width, scaled, inverse, inverse_scaled, BLOCK)
    v = _scale_row(image, 1, row, rows, width, scaled, inverse, inverse_scaled, BLOCK)
    frozen_t = _scale_row(frozen_text, 2, row, rows, width, scaled, inverse, inverse_scaled, BLOCK)
    frozen_v = _scale_row(frozen_image, 3, row, rows, width, scaled, inverse, inverse_scaled, BLOCK)
    cos_t = tl.sum(t * frozen_t, axis=0)
    cos_v = tl.sum(v * frozen_v, axis=0)
    tl.store(cosines + row, cos_t)
    tl.store(cosines + rows + row, cos_v)
    per_row = 1.0 / rows.to(tl.float32)
    tl.store(row_terms + row, (1.0 - cos_t) * per_row)
    tl.store(row_terms + rows + row, (1.0 - cos_v) * per_row)


@triton.jit
def _products(
    columns, left, right, first_row, first_column, rows, width,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, BLOCK_WIDTH: tl.constexpr,
):  # fmt: skip
    """A tile of inner products of matrix `left`'s rows and matrix `right`'s, in the stack `columns` [4, B, d]."""
    row = tl.arange(0, BLOCK_ROWS)
    column = tl.arange(0, BLOCK_COLUMNS)
    product, _ = dot_tile(
        row_pointer(columns, left * rows + first_row, width), row, row < rows - first_row,
        row_pointer(columns, right * rows + first_column, width), column, column < rows - first_column, width,
        BLOCK_ROWS, BLOCK_COLUMNS, BLOCK_WIDTH, columns.dtype.element_ty, EXACT, False,
    )  # fmt: skip
    return product


@tuned(LOG_SUM, key=["width", "BLOCK_ROWS"])
@triton.jit(do_not_specialize=["rows"])
def log_sum_kernel(
    columns, inverse_scaled, log_sums, row_terms, rows, width, logit_scale, weight_2, weight_3,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, BLOCK_WIDTH: tl.constexpr,
):  # fmt: skip
    """log_sums [3, 4, B] and one half of each row's InfoNCE loss, into its slab of row_terms.

    Tasks (the 4): rows of (text, frozen image), rows of (image, frozen text), columns of the first, of the second.
    The 3: the largest logit and the log2 of the sum relative to it (their sum would be rounded at the size of the
    logit, 100 and more), and the softmax's share off the diagonal.
    """
    task = tl.program_id(1)
    term = task % 2
    if tl.where(term == 0, weight_2, weight_3) != 0:
        left = tl.where(task < 2, term, 3 - term)
        first_row = tl.program_id(0) * BLOCK_ROWS
        row = first_row + tl.arange(0, BLOCK_ROWS)
        largest = tl.full([BLOCK_ROWS], NOTHING, tl.float32)
        total = tl.zeros([BLOCK_ROWS], tl.float32)
        diagonal = tl.zeros([BLOCK_ROWS], tl.float32)
        inverse_left = tl.load(inverse_scaled + left * rows + row, mask=row < rows, other=0.0)
        for begin in range(0, rows, BLOCK_COLUMNS):
            column = begin + tl.arange(0, BLOCK_COLUMNS)
            product = _products(columns, left, 3 - left, first_row, begin, rows, width,
                                BLOCK_ROWS, BLOCK_COLUMNS, BLOCK_WIDTH)  # fmt: skip
            inverse_right = tl.load(inverse_scaled + (3 - left) * rows + column, mask=column < rows, other=0.0)
            logits = product * (inverse_left[:, None] * inverse_right[None, :]) * (logit_scale * LOG2_E)
            own = row[:, None] == column[None, :]
            diagonal += tl.sum(tl.where(own, logits, 0.0), axis=1)
            logits = tl.where(own | (column >= rows)[None, :], float("-inf"), logits)
            largest, total = log_sum_step(largest, total, logits)
        top = tl.maximum(largest, diagonal)
        others = total * tl.exp2(largest - top)
        total = others + tl.exp2(diagonal - top)
        place = log_sums + task * rows + row
        tl.store(place, top, mask=row < rows)
        tl.store(place + 4 * rows, tl.log2(total), mask=row < rows)
        tl.store(place + 8 * rows, others / total, mask=row < rows)
        half = 0.5 * LN_2 / rows.to(tl.float32)
        loss = half * ((top - diagonal) + tl.log2(total))
        tl.store(row_terms + ((task // 2) * 4 + 2 + term) * rows + row, loss, mask=row < rows)


@tuned(GRADIENT, key=["width", "BLOCK_ROWS"])
@triton.jit(do_not_specialize=["rows"])
def gradient_kernel(
    columns, inverse, inverse_scaled, log_sums, cosines, grad_text, grad_image,
    rows, width, logit_scale, weight_0, weight_1, weight_2, weight_3,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, BLOCK_WIDTH: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """CHUNK columns of d loss / d text (program_id(2) = 0) or d loss / d image (1) for a block of rows."""
    side = tl.program_id(2)
    first_row = tl.program_id(0) * BLOCK_ROWS
    row = first_row + tl.arange(0, BLOCK_ROWS)
    local = tl.arange(0, BLOCK_ROWS)
    valid = row < rows
    chunk = tl.program_id(1) * CHUNK + tl.arange(0, CHUNK)
    weight_cos = tl.where(side == 0, weight_0, weight_1)
    weight_nce = tl.where(side == 0, weight_2, weight_3)
    other = 3 - side
    largest_row = tl.load(log_sums + side * rows + row, mask=valid, other=0.0)
    rest_row = tl.load(log_sums + (4 + side) * rows + row, mask=valid, other=0.0)
    to_others = tl.load(log_sums + (8 + side) * rows + row, mask=valid, other=0.0)
    to_others += tl.load(log_sums + (10 + side) * rows + row, mask=valid, other=0.0)
    inverse_left = tl.load(inverse_scaled + side * rows + row, mask=valid, other=0.0)
    g = tl.zeros([BLOCK_ROWS, CHUNK], tl.float32)
    along = tl.zeros([BLOCK_ROWS], tl.float32)  # g.u
    last = tl.where(weight_nce != 0, rows, 0)
    for begin in range(0, last, BLOCK_COLUMNS):
        column = begin + tl.arange(0, BLOCK_COLUMNS)
        product = _products(columns, side, other, first_row, begin, rows, width,
                            BLOCK_ROWS, BLOCK_COLUMNS, BLOCK_WIDTH)  # fmt: skip
        largest_column = tl.load(log_sums + (2 + side) * rows + column, mask=column < rows, other=0.0)
        rest_column = tl.load(log_sums + (6 + side) * rows + column, mask=column < rows, other=0.0)
        inverse_right = tl.load(inverse_scaled + other * rows + column, mask=column < rows, other=0.0)
        logits = product * (inverse_left[:, None] * inverse_right[None, :]) * (logit_scale * LOG2_E)
        d = tl.exp2(logits - largest_row[:, None] - rest_row[:, None])
        d += tl.exp2(logits - largest_column[None, :] - rest_column[None, :])
        d = tl.where(row[:, None] == column[None, :], -to_others[:, None], d)
        d = tl.where(valid[:, None] & (column < rows)[None, :], d, 0.0)
        rounded = (d * inverse_right[None, :]).to(columns.dtype.element_ty)
        tile = load_tile(row_pointer(columns, other * rows + begin, width), tl.arange(0, BLOCK_COLUMNS), column < rows,
                         chunk, width, columns.dtype.element_ty)  # fmt: skip
        g = tl.dot(rounded, tile, g, input_precision=EXACT)
        along += tl.sum(rounded.to(tl.float32) * product, axis=1)
    per_row = 1.0 / rows.to(tl.float32)
    own = load_tile(row_pointer(columns, (2 + side) * rows + first_row, width), local, valid, chunk, width, tl.float32)
    inverse_own = tl.load(inverse_scaled + (2 + side) * rows + row, mask=valid, other=0.0)
    unit = load_tile(row_pointer(columns, side * rows + first_row, width), local, valid, chunk, width, tl.float32)
    unit *= inverse_left[:, None]
    cosine_own = tl.load(cosines + side * rows + row, mask=valid, other=0.0)
    per_logit = weight_nce * 0.5 * logit_scale * per_row
    g = per_logit * g - weight_cos * per_row * inverse_own[:, None] * own
    along = per_logit * inverse_left * along - weight_cos * per_row * cosine_own
    g = (g - along[:, None] * unit) * tl.load(inverse + side * rows + row, mask=valid, other=0.0)[:, None]
    place = row.to(tl.int64)[:, None] * width + chunk[None, :]
    mask = valid[:, None] & (chunk < width)[None, :]
    if side == 0:
        tl.store(grad_text + place, g, mask=mask)
    else:
        tl.store(grad_image + place, g, mask=mask)


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
    matrices = [matrix.contiguous() for matrix in (text, image, frozen_text, frozen_image)]
    rows, width = text.shape
    block = triton.next_power_of_2(width)
    dtype = functools.reduce(torch.promote_types, (matrix.dtype for matrix in matrices))
    wide = has_wide_tiles(text.device) and dtype != torch.float32
    block_rows = rows_per_block(rows, wide)
    scaled = text.new_empty((4, rows, width), dtype=dtype)
    inverse, inverse_scaled = text.new_empty((2, 4, rows), dtype=torch.float32)
    log_sums = text.new_empty((3, 4, rows), dtype=torch.float32)
    cosines = text.new_empty((2, rows), dtype=torch.float32)
    row_terms = text.new_zeros((2, 4, rows), dtype=torch.float32)
    grad_text = text.new_empty((rows if need_grad else 0, width))
    grad_image = text.new_empty((rows if need_grad else 0, width))
    nce = weights[2] != 0 or weights[3] != 0
    with on_device(text):
        rows_kernel[(rows,)](
            *matrices, scaled, inverse, inverse_scaled, cosines, row_terms, rows, width,
            BLOCK=block, num_warps=row_warps(block),
        )  # fmt: skip
        if nce:
            log_sum_kernel[(triton.cdiv(rows, block_rows), 4)](
                scaled, inverse_scaled, log_sums, row_terms, rows, width, logit_scale, *weights[2:],
                BLOCK_ROWS=block_rows,
            )  # fmt: skip
        if need_grad:
            block_rows = min(block_rows, 64)  # the [rows, CHUNK] accumulator takes the registers
            gradient_kernel[lambda meta: (triton.cdiv(rows, block_rows), triton.cdiv(width, meta["CHUNK"]), 2)](
                scaled, inverse, inverse_scaled, log_sums, cosines, grad_text, grad_image,
                rows, width, logit_scale, *weights, BLOCK_ROWS=block_rows,
            )  # fmt: skip
        loss, terms = sum_terms(row_terms, weights)
    return loss, terms, grad_text, grad_image
