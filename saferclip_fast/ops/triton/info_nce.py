"""InfoNCE in chunks of rows: the products are the vendor's, two kernels turn a chunk of logits into sums and weights.

S = logit_scale x y^T is made a chunk of rows at a time by torch.mm, in float32, from rows as x 2^-e with
1 <= |x 2^-e| < 2 (exact; a product of two cannot overflow). No atomics: every sum has one program and a fixed order.

1. `sums_kernel`, over a chunk: a program a row for its largest logit and the log of its sum, and a program a block of
   columns for the columns' running (largest, sum), which go from chunk to chunk.
2. `weights_kernel`, over the chunk again (kept, or its product made again): softmax of the row + softmax of the column
   - 2 on the diagonal, with 1/|y| in it, in the rows' dtype. One more product with y is the gradient along the row.
3. `finish_kernel`: the projection (g - (g.u) u) / |x|, and for `preservation_loss` the cosine's part.

The diagonal stays in the weights, as (p - 1) + (q - 1): a row's small gradient is no difference of two rounded ones.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .shared import (
    INTERPRETED,
    load_row,
    on_device,
    power_of_two_below,
    row_pointer,
    row_warps,
    through_norm,
)

# 8 entries a thread, in a row and in a tile of columns; few under the interpreter, so that loops are exercised
COLUMNS, TILE_ROWS, TILE_COLUMNS = (8, 2, 8) if INTERPRETED else (2048, 32, 64)
# Without fused multiply-adds, which would leave a logit unrounded beside its rounded maximum.
LAUNCH = dict(num_warps=8, enable_fp_fusion=False)
NOTHING = tl.constexpr(-1e30)  # finite, so that a row of -inf logits gives a sum of 0 and not NaN
RAISED = tl.constexpr(4096.0)  # weights are stored times this: float16 rounds below 6e-5 more coarsely
ROW_TILE = 128  # rows of a tile of the vendor's products: a chunk that is no multiple of it wastes a part
# A chunk's product reads all of y: below 241 rows an H100 (700 TFLOP/s, 2.9 TB/s) would wait for a y that is not in L2.
FEWEST_ROWS = 256
BEYOND_CACHE = 256 << 20  # bytes of a chunk where L2 would hold fewer rows: then y is read a quarter as often, or less


class Rows(NamedTuple):
    """Rows x as the products take them."""

    scaled: Tensor  # [n, d] x 2^-e
    inverse: Tensor  # [n] float32: 1/|x|
    inverse_scaled: Tensor  # [n] float32: 1/|x 2^-e|


@triton.jit
def scale_row(matrix, row, width, scaled, inverse, inverse_scaled, place, BLOCK: tl.constexpr):
    """Stores x 2^-e and both inverse norms of one row at `place`, and returns the unit row in float32."""
    columns = tl.arange(0, BLOCK)
    wide = load_row(matrix, row, width, BLOCK, tl.float64)
    norm = tl.sqrt(tl.sum(wide * wide, axis=0))
    scale = tl.where(norm > 0, 1.0 / power_of_two_below(norm), 0.0)
    out = row_pointer(scaled, place, width) + columns
    tl.store(out, (wide * scale).to(tl.float32).to(scaled.dtype.element_ty), mask=columns < width)
    one_over = tl.where(norm > 0, 1.0 / norm, 0.0)
    tl.store(inverse + place, one_over.to(tl.float32))
    tl.store(inverse_scaled + place, tl.where(norm > 0, 1.0 / (norm * scale), 0.0).to(tl.float32))
    return (wide * one_over).to(tl.float32)


@triton.jit
def scale_kernel(matrix, scaled, inverse, inverse_scaled, width, BLOCK: tl.constexpr):
    """What `Rows` holds, a program a row."""
    row = tl.program_id(0).to(tl.int64)
    scale_row(matrix, row, width, scaled, inverse, inverse_scaled, row, BLOCK)


@triton.jit
def logits_of(product, inverse_x, inverse_y, logit_scale):
    """One order of the factors for sums and weights: two would differ by a rounding of a logit, 1e-5 at 100."""
    return product * (inverse_x * inverse_y) * logit_scale


@triton.jit(do_not_specialize=["begin", "count", "first", "row_count"])
def sums_kernel(
    chunk, inverse_x, inverse_y, mask, rows, columns, begin, count, first, row_count, column_count, logit_scale,
    MASKED: tl.constexpr, COLUMNS: tl.constexpr, TILE_ROWS: tl.constexpr, TILE_COLUMNS: tl.constexpr,
):  # fmt: skip
    """rows [3, M] (largest, log, diagonal) of rows begin to begin + count, and the chunk's part of columns [2, B]."""
    program = tl.program_id(0)
    if program < count:
        of_row = tl.load(inverse_x + begin + program)
        largest = tl.full([], NOTHING, tl.float32)
        total = tl.zeros([], tl.float32)
        diagonal = tl.zeros([], tl.float32)
        for left in range(0, column_count, COLUMNS):
            column = left + tl.arange(0, COLUMNS)
            inside = column < column_count
            product = tl.load(row_pointer(chunk, program, column_count) + column, mask=inside, other=0.0)
            logits = logits_of(product, of_row, tl.load(inverse_y + column, mask=inside, other=0.0), logit_scale)
            diagonal += tl.sum(tl.where(column == first + begin + program, logits, 0.0), axis=0)
            if MASKED:
                inside = inside & (tl.load(mask + column, mask=inside, other=0) != 0)
            logits = tl.where(inside, logits, float("-inf"))
            higher = tl.maximum(largest, tl.max(logits, axis=0))
            total = total * tl.exp(largest - higher) + tl.sum(tl.exp(logits - higher), axis=0)
            largest = higher
        tl.store(rows + begin + program, largest)
        tl.store(rows + row_count + begin + program, tl.log(total))
        tl.store(rows + 2 * row_count + begin + program, diagonal)
    else:
        column = (program - count) * TILE_COLUMNS + tl.arange(0, TILE_COLUMNS)
        inside = column < column_count
        of_column = tl.load(inverse_y + column, mask=inside, other=0.0)
        tops = tl.load(columns + column, mask=inside, other=0.0)
        totals = tl.load(columns + column_count + column, mask=inside, other=0.0)
        for top in range(0, count, TILE_ROWS):
            row = top + tl.arange(0, TILE_ROWS)
            chosen = row < count
            tile = chunk + row.to(tl.int64)[:, None] * column_count + column[None, :]
            products = tl.load(tile, mask=chosen[:, None] & inside[None, :], other=0.0)
            of_rows = tl.load(inverse_x + begin + row, mask=chosen, other=0.0)
            tiled = logits_of(products, of_rows[:, None], of_column[None, :], logit_scale)
            if MASKED:
                chosen = chosen & (tl.load(mask + first + begin + row, mask=chosen, other=0) != 0)
            tiled = tl.where(chosen[:, None], tiled, float("-inf"))
            above = tl.maximum(tops, tl.max(tiled, axis=0))
            totals = totals * tl.exp(tops - above) + tl.sum(tl.exp(tiled - above[None, :]), axis=0)
            tops = above
        tl.store(columns + column, tops, mask=inside)
        tl.store(columns + column_count + column, totals, mask=inside)


@triton.jit(do_not_specialize=["begin", "first", "row_count"])
def weights_kernel(
    chunk, weights, inverse_x, inverse_y, mask, rows, columns, begin, first, row_count, column_count, logit_scale,
    MASKED: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """weights [count, B]: (p_row + p_column - 2 [own]) / |y 2^-e|, 0 where row or column is left out."""
    program = tl.program_id(0)
    row = begin + program
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < column_count
    chosen = inside
    if MASKED:
        chosen = inside & (tl.load(mask + column, mask=inside, other=0) != 0) & (tl.load(mask + first + row) != 0)
    inverse = tl.load(inverse_y + column, mask=inside, other=0.0)
    product = tl.load(row_pointer(chunk, program, column_count) + column, mask=inside, other=0.0)
    own = column == first + row
    logits = logits_of(product, tl.load(inverse_x + row), inverse, logit_scale)
    # what the sums hold: a product in another shape (the sides' roles changed) may be rounded otherwise
    logits = tl.where(own, tl.load(rows + 2 * row_count + row), logits)
    of_row = tl.exp((logits - tl.load(rows + row)) - tl.load(rows + row_count + row))
    largest = tl.load(columns + column, mask=inside, other=0.0)
    rest = tl.load(columns + column_count + column, mask=inside, other=0.0)
    of_column = tl.exp((logits - largest) - rest)
    one = tl.where(own, 1.0, 0.0)
    weight = tl.where(chosen, (of_row - one) + (of_column - one), 0.0) * inverse * RAISED
    tl.store(row_pointer(weights, program, column_count) + column, weight, mask=inside)


@triton.jit(do_not_specialize=["begin"])
def finish_kernel(
    along, scaled, inverse, inverse_scaled, frozen, inverse_frozen, share, grad, begin, width,
    weight_cosine, COSINE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """grad [M, d]: share * along - weight_cosine * own frozen unit row, through the norm of the row."""
    row = tl.program_id(0)
    unit = load_row(scaled, begin + row, width, BLOCK, tl.float32) * tl.load(inverse_scaled + begin + row)
    g = load_row(along, row, width, BLOCK, tl.float32) * tl.load(share)
    if COSINE:
        own = load_row(frozen, begin + row, width, BLOCK, tl.float32) * tl.load(inverse_frozen + begin + row)
        g -= weight_cosine * own
    g = through_norm(g, unit, tl.load(inverse + begin + row))
    columns = tl.arange(0, BLOCK)
    tl.store(row_pointer(grad, begin + row, width) + columns, g, mask=columns < width)


def prepared(matrix: Tensor, dtype: torch.dtype) -> Rows:
    """`Rows` of a matrix, in a dtype that holds its own."""
    matrix = matrix.contiguous()
    count, width = matrix.shape
    block = triton.next_power_of_2(width)
    scaled = matrix.new_empty((count, width), dtype=dtype)
    inverse, inverse_scaled = matrix.new_empty((2, count), dtype=torch.float32)
    if count:
        scale_kernel[(count,)](matrix, scaled, inverse, inverse_scaled, width, BLOCK=block, num_warps=row_warps(block))
    return Rows(scaled, inverse, inverse_scaled)


def chunk_rows(like: Tensor, columns: int) -> int:
    """Rows of S at a time: those that fill half of the L2 cache, and whole tiles of the vendor's products.

    S is written once and read up to three times, so it should stay in L2; half is left to y and the weights. Fewer
    rows would leave the device waiting for the host: a chunk costs six launches of about 8 us. Where too few fit, y
    does not either, and S goes through memory anyway: as many as BEYOND_CACHE holds.
    """
    if not like.is_cuda:
        return 4  # under the interpreter: several chunks
    cache = torch.cuda.get_device_properties(like.device).L2_cache_size
    within, beyond = (size // (4 * columns) // ROW_TILE * ROW_TILE for size in (cache // 2, BEYOND_CACHE))
    return within if within >= FEWEST_ROWS else max(FEWEST_ROWS, beyond)


def multiply(a: Tensor, b: Tensor, out: Tensor) -> None:
    """out = a b in float32: 16-bit rows by tensor cores, float32 rows as torch is set (in TF32, or not)."""
    if a.is_cuda and a.dtype != torch.float32:
        torch.mm(a, b, out_dtype=torch.float32, out=out)
    else:
        torch.mm(a.float(), b.float(), out=out)


def sums(
    x: Rows, y: Rows, mask: Tensor | None, first: int, logit_scale: float, logits: Tensor
) -> tuple[Tensor, Tensor]:
    """(rows, columns) of `info_nce_sums`; the products go to `logits` [M, B], or if it is empty to a chunk."""
    row_count, column_count = len(x.scaled), len(y.scaled)
    rows = x.inverse.new_empty((3, row_count))
    columns = x.inverse.new_zeros((2, column_count))
    columns[0] = NOTHING.value
    step = chunk_rows(x.scaled, column_count)
    spare = x.inverse.new_empty((0 if len(logits) else min(step, row_count), column_count))
    for begin in range(0, row_count, step):
        count = min(step, row_count - begin)
        chunk = logits[begin : begin + count] if len(logits) else spare[:count]
        multiply(x.scaled[begin : begin + count], y.scaled.T, chunk)
        sums_kernel[(count + triton.cdiv(column_count, TILE_COLUMNS),)](
            chunk, x.inverse_scaled, y.inverse_scaled, rows if mask is None else mask, rows, columns,
            begin, count, first, row_count, column_count, logit_scale,
            MASKED=mask is not None, COLUMNS=COLUMNS, TILE_ROWS=TILE_ROWS, TILE_COLUMNS=TILE_COLUMNS, **LAUNCH,
        )  # fmt: skip
    return rows, columns


def value(mask: Tensor | None, rows: Tensor, columns: Tensor, first: int) -> tuple[Tensor, Tensor]:
    """The loss of the chosen rows over the number of all, and that number."""
    own = slice(first, first + rows.shape[1])
    largest, log, diagonal = rows
    halves = (largest - diagonal + log) + (columns[0, own] - diagonal + columns[1, own])
    if mask is None:
        return 0.5 * halves.sum() / columns.shape[1], halves.new_full((), columns.shape[1])
    count = mask.sum().clamp(min=1).to(halves.dtype)
    return 0.5 * halves.where(mask[own] != 0, 0.0).sum() / count, count


def gradient(
    x: Rows,
    y: Rows,
    mask: Tensor | None,
    rows: Tensor,
    columns: Tensor,
    first: int,
    logit_scale: float,
    logits: Tensor,
    finish: Callable[[Tensor, int], None],
) -> None:
    """A chunk of rows at a time, sum_j weights_ij y_j to `finish` (along [count, d], begin)."""
    row_count, (column_count, width) = len(x.scaled), y.scaled.shape
    step = min(chunk_rows(x.scaled, column_count), row_count)
    spare = x.inverse.new_empty((0 if len(logits) else step, column_count))
    weights = y.scaled.new_empty((step, column_count))
    along = x.inverse.new_empty((step, width))
    for begin in range(0, row_count, max(step, 1)):
        count = min(step, row_count - begin)
        chunk = logits[begin : begin + count] if len(logits) else spare[:count]
        if not len(logits):
            multiply(x.scaled[begin : begin + count], y.scaled.T, chunk)
        weights_kernel[(count, triton.cdiv(column_count, COLUMNS))](
            chunk, weights, x.inverse_scaled, y.inverse_scaled, rows if mask is None else mask, rows, columns,
            begin, first, row_count, column_count, logit_scale,
            MASKED=mask is not None, COLUMNS=COLUMNS, **LAUNCH,
        )  # fmt: skip
        multiply(weights[:count], y.scaled, along[:count])
        finish(along[:count], begin)


def finished(x: Rows, grad: Tensor, share: Tensor, frozen: Rows | None = None, cosine: float = 0.0) -> Callable:
    """What `gradient` calls: writes rows of `grad`; `cosine` is the weight of a row's cosine to its frozen row."""
    width = grad.shape[1]
    block = triton.next_power_of_2(width)
    other = x if frozen is None else frozen

    def finish(along: Tensor, begin: int) -> None:
        finish_kernel[(len(along),)](
            along, *x, other.scaled, other.inverse_scaled, share, grad, begin, width, cosine,
            COSINE=frozen is not None, BLOCK=block, num_warps=row_warps(block),
        )  # fmt: skip

    return finish


def of_gradient(logit_scale: float, count: Tensor) -> Tensor:
    """What the weights' products are multiplied by: 0.5 logit_scale / n, and what they were raised by."""
    return 0.5 * logit_scale / (RAISED.value * count)


def _sides(x: Tensor, y: Tensor, mask: Tensor | None) -> tuple[Rows, Rows, Tensor | None]:
    dtype = torch.promote_types(x.dtype, y.dtype)
    return prepared(x, dtype), prepared(y, dtype), None if mask is None else mask.to(torch.uint8).contiguous()


def info_nce_sums(
    x: Tensor, y: Tensor, mask: Tensor | None, first: int, logit_scale: float, keep: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The schema of `schemas.SCHEMAS`; float32, bfloat16 or float16 (where they differ, in the wider one), any d."""
    logits = x.new_empty((len(x) if keep else 0, len(y)), dtype=torch.float32)
    with on_device(x):
        of_x, of_y, mask = _sides(x, y, mask)
        rows, columns = sums(of_x, of_y, mask, first, logit_scale, logits)
    return rows, columns, logits


def info_nce_loss(
    x: Tensor,
    y: Tensor,
    mask: Tensor | None,
    rows: Tensor,
    columns: Tensor,
    logits: Tensor,
    first: int,
    logit_scale: float,
    need_grad: bool,
) -> tuple[Tensor, Tensor]:
    """The schema of `schemas.SCHEMAS`; `logits` are those that `info_nce_sums` kept, or empty."""
    grad = x.new_empty((len(x) if need_grad else 0, x.shape[1]))
    rows, columns = rows.contiguous(), columns.contiguous()
    with on_device(x):
        loss, count = value(mask, rows, columns, first)
        if len(grad):
            of_x, of_y, mask = _sides(x, y, mask)
            finish = finished(of_x, grad, of_gradient(logit_scale, count))
            gradient(of_x, of_y, mask, rows, columns, first, logit_scale, logits, finish)
    return loss, grad
