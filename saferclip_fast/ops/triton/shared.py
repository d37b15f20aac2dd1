"""Parts that the kernels share: tile loading and the tile product, and the running top-k.

Matrices are row-major and contiguous; `rows` are row numbers, `width` is d. Accumulation is float32.
"""

from __future__ import annotations

import contextlib
import functools
import os

import torch
import triton
import triton.language as tl
from torch import Tensor

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

# --- Launch helpers --------------------------------------------------------------------------------------------------


def on_device(tensor: Tensor) -> contextlib.AbstractContextManager:
    """Triton launches on the current device, so make it the tensor's."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def processors(tensor: Tensor) -> int:
    """Multiprocessors of the tensor's device (2 under the interpreter, so that splitting is exercised)."""
    return torch.cuda.get_device_properties(tensor.device).multi_processor_count if tensor.is_cuda else 2


def rows_per_block(rows: int, wide: bool, keep: int = 0) -> int:
    """A step function of the batch size, so that a batch size that varies a little neither recompiles nor re-tunes.

    The running top-k holds `keep` keys a row in registers: above these limits the compiled kernels spill. 128 rows
    need an accumulator that the tensor cores keep for themselves (`wide`).
    """
    largest = 16 if keep > 64 else 64 if keep > 8 or not wide else 128
    return min(16 if rows <= 16 else 64 if rows <= 256 else 128, largest)


@functools.cache
def has_wide_tiles(device: torch.device) -> bool:
    """wgmma (Hopper) and tcgen05 (data-center Blackwell); the other chips go through mma.sync fragments."""
    return device.type == "cuda" and not torch.version.hip and torch.cuda.get_device_capability(device)[0] in (9, 10)


def screening_float32() -> str:
    """Float32 products whose error a bound covers: TF32, or float32 itself where AMD's matrix cores take it."""
    return "ieee" if torch.version.hip else "tf32"


def row_warps(block: int) -> int:
    """Warps for a kernel that holds whole rows: 8 elements a thread, so that bfloat16 loads are 16 bytes."""
    return max(1, min(16, block // 256))


# --- Tiles -----------------------------------------------------------------------------------------------------------


@triton.jit
def load_tile(matrix, rows, rows_valid, columns, width, DTYPE: tl.constexpr):
    """[len(rows), len(columns)] of `matrix` in DTYPE, zero where a row or column is outside.

    Offsets are computed in the type of `rows`: int64 for scattered rows; int32, at half the registers, for rows
    counted from a `matrix` pointer that was moved to the block's first row (`row_pointer`).
    """
    mask = rows_valid[:, None] & (columns < width)[None, :]
    return tl.load(matrix + rows[:, None] * width + columns[None, :], mask=mask, other=0.0).to(DTYPE)


@triton.jit
def row_pointer(matrix, row, width):
    """Where row number `row` (a scalar) begins, in 64 bits."""
    return matrix + tl.cast(row, tl.int64) * width


@triton.jit
def dot_tile(
    left, left_rows, left_valid, right, right_rows, right_valid, width,
    BLOCK_LEFT: tl.constexpr, BLOCK_RIGHT: tl.constexpr, BLOCK_WIDTH: tl.constexpr,
    DTYPE: tl.constexpr, PRECISION: tl.constexpr, SQUARES: tl.constexpr,
):  # fmt: skip
    """[BLOCK_LEFT, BLOCK_RIGHT] float32 inner products of two sets of rows, and the right rows' squares if SQUARES."""
    product = tl.zeros([BLOCK_LEFT, BLOCK_RIGHT], tl.float32)
    squares = tl.zeros([BLOCK_RIGHT], tl.float32)
    for begin in range(0, width, BLOCK_WIDTH):
        columns = begin + tl.arange(0, BLOCK_WIDTH)
        a = load_tile(left, left_rows, left_valid, columns, width, DTYPE)
        b = load_tile(right, right_rows, right_valid, columns, width, DTYPE)
        product = tl.dot(a, tl.trans(b), product, input_precision=PRECISION)
        if SQUARES:
            wide = b.to(tl.float32)
            squares += tl.sum(wide * wide, axis=1)
    return product, squares


@triton.jit
def load_row(matrix, row, width, BLOCK: tl.constexpr, DTYPE: tl.constexpr):
    """[BLOCK] = one whole row in DTYPE, zero beyond `width`."""
    columns = tl.arange(0, BLOCK)
    return tl.load(row_pointer(matrix, row, width) + columns, mask=columns < width, other=0.0).to(DTYPE)


@triton.jit
def unit_row(matrix, row, width, BLOCK: tl.constexpr):
    """A row at length 1 in float32 (a zero row stays zero) and 1/|row|; scaled first, so no square overflows."""
    x = load_row(matrix, row, width, BLOCK, tl.float32)
    largest = tl.max(tl.abs(x), axis=0)
    x = x / tl.where(largest > 0, largest, 1.0)
    norm = tl.sqrt(tl.sum(x * x, axis=0))
    inverse = tl.where(largest > 0, 1.0 / norm, 0.0)
    return x * inverse, tl.where(largest > 0, inverse / largest, 0.0)


@triton.jit
def through_norm(g, unit, inverse):
    """d/dx from d/du for u = x/|x|: (g - (g.u) u) / |x|, for one row."""
    return (g - tl.sum(g * unit, axis=0) * unit) * inverse


@triton.jit
def power_of_two_below(length):
    """2^e with 2^e <= length < 2^(e+1), for a float64 length; exact, from the exponent bits."""
    return (length.to(tl.int64, bitcast=True) & 0x7FF0000000000000).to(tl.float64, bitcast=True)


@triton.jit
def largest_norm(squares, splits, SPLITS: tl.constexpr):
    """The square root of the largest of squares [splits]."""
    split = tl.arange(0, SPLITS)
    return tl.sqrt(tl.max(tl.load(squares + split, mask=split < splits, other=0.0), axis=0))


# --- Running top-k ---------------------------------------------------------------------------------------------------
# A candidate is one int64 key: the float32 score's bits made orderable in the high half, 2^32 - 1 - index in the low
# half. So a larger key is a higher score or, between equal scores, a lower index, and keys are unique.

EMPTY = tl.constexpr(-(0x7F800000 << 32))  # score -inf, index 2^32 - 1


@triton.jit
def pack_key(score, index):
    """int64 keys in the order of (score, lower index first), so that one comparison ranks candidates."""
    bits = (score + 0.0).to(tl.int32, bitcast=True).to(tl.int64)  # + 0.0 turns -0.0 into 0.0
    return (tl.where(bits < 0, -(bits & 0x7FFFFFFF), bits) << 32) + (0xFFFFFFFF - index.to(tl.int64))


@triton.jit
def key_score(key):
    """The float32 score of a key."""
    ordered = key >> 32
    bits = tl.where(ordered < 0, (-ordered) | 0x80000000, ordered)
    return bits.to(tl.uint32).to(tl.float32, bitcast=True)


@triton.jit
def key_index(key):
    """The index of a key."""
    return 0xFFFFFFFF - (key & 0xFFFFFFFF)


@triton.jit
def empty_keys(ROWS: tl.constexpr, KEYS: tl.constexpr):
    """[ROWS, KEYS] keys below every candidate, all different so that one insertion fills one place."""
    return tl.broadcast_to(tl.arange(0, KEYS).to(tl.int64)[None, :] + EMPTY, [ROWS, KEYS])


@triton.jit
def insert_key(keys, new):
    """Puts new[r] in place of the smallest of keys[r, :] where it is larger; keys [R, K], new [R]."""
    smallest = tl.min(keys, axis=1)
    return tl.where((keys == smallest[:, None]) & (new > smallest)[:, None], new[:, None], keys)


@triton.jit
def first_column(scores, value):
    """The first column of scores [R, C] that holds value [R] (C where none does): fewer registers than an argmax."""
    columns = tl.arange(0, scores.shape[1])
    return tl.min(tl.where(scores == value[:, None], columns[None, :], scores.shape[1]), axis=1)


@triton.jit
def merge_scores(keys, scores, first_index):
    """The keys [R, K] after all of scores [R, C] (of indices first_index + column) had their turn.

    A column costs one comparison unless it enters: the row maximum is taken out only while it beats the worst key.
    """
    columns = tl.arange(0, scores.shape[1])
    best = tl.max(scores, axis=1)
    worst = key_score(tl.min(keys, axis=1))
    while tl.max((best > worst).to(tl.int32), axis=0) > 0:
        at = first_column(scores, best)
        new = tl.where(best > worst, pack_key(best, first_index + at), EMPTY)
        keys = insert_key(keys, new)
        scores = tl.where(columns[None, :] == at[:, None], float("-inf"), scores)
        best = tl.max(scores, axis=1)
        worst = key_score(tl.min(keys, axis=1))
    return keys


@triton.jit
def kth_largest_score(keys, K: tl.constexpr):
    """The K-th largest score of keys [C] (int64), found bit by bit in 32 counts."""
    if K == 1:
        return key_score(tl.max(keys, axis=0))
    ordered = (keys >> 32) + 0x80000000
    largest = tl.full([], 0, tl.int64)
    for step in range(32):
        trial = largest | (tl.full([], 0x80000000, tl.int64) >> step)
        enough = tl.sum((ordered >= trial).to(tl.int32), axis=0) >= K
        largest = tl.where(enough, trial, largest)
    return key_score((largest - 0x80000000) << 32)


@triton.jit
def store_best(keys, k, scores, indices, last_index):
    """Writes the k largest of keys [C], in order, to scores[0..k) and indices[0..k)."""
    for place in range(k):
        top = tl.max(keys, axis=0)
        tl.store(scores + place, key_score(top))
        tl.store(indices + place, tl.minimum(key_index(top), last_index))
        keys = tl.where(keys == top, EMPTY, keys)


# --- Terms of a loss -------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["rows"])
def sum_terms_kernel(row_terms, terms, loss, weight_0, weight_1, weight_2, weight_3, rows,
                     SLABS: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """terms[j] = sum over slabs and rows of row_terms [SLABS, 4, rows]; loss = sum_j weight_j terms[j].

    One program and a fixed order, so the same inputs give the same bits. Slabs are added row by row first: they may
    cancel (a log-sum-exp and its diagonal logit).
    """
    term = tl.arange(0, 4)
    total = tl.zeros([4, BLOCK], tl.float32)
    for begin in range(0, rows, BLOCK):
        row = begin + tl.arange(0, BLOCK)
        block_terms = tl.zeros([4, BLOCK], tl.float32)
        for slab in tl.static_range(SLABS):
            pointers = row_terms + (slab * 4 + term).to(tl.int64)[:, None] * rows + row[None, :]
            block_terms += tl.load(pointers, mask=(row < rows)[None, :], other=0.0)
        total += block_terms
    value = tl.sum(total, axis=1)
    tl.store(terms + term, value)
    weight = tl.where(term == 0, weight_0, tl.where(term == 1, weight_1, tl.where(term == 2, weight_2, weight_3)))
    tl.store(loss, tl.sum(weight * value, axis=0))


def sum_terms(row_terms: Tensor, weights: list[float]) -> tuple[Tensor, Tensor]:
    """(loss, terms) of row_terms [slabs, 4, rows] float32."""
    slabs, _, rows = row_terms.shape
    loss, terms = row_terms.new_empty(()), row_terms.new_empty(4)
    sum_terms_kernel[(1,)](row_terms, terms, loss, *weights, rows, SLABS=slabs, BLOCK=512, num_warps=4)
    return loss, terms
