"""The screen of `nearest_safe` on Hopper and data-center Blackwell: the two best of each group, and no running top-k.

It takes the place of steps 2 and 3 of `nearest_safe.py` where `configs.takes_groups` says so, with its notation.

1. What is screened: 16-bit banks as they are; of float32 banks the fp16 copy s' that `SafeBank.pack` made for the CUDA
   kernels (or one made here), row j relative to its largest element, with |s_j| and |s_j - s'_j| measured.
2. `screen_groups`: x_ij = <q~_i, s'_j> tile by tile. A group is every eighth column of a tile, 32 rows of the bank. Of
   each group the largest x goes to memory, with the row's place in its low 5 bits, and the second largest, as a bound
   of the other 31. Tiles share nothing, so blocks take them in turn: no lists, no atomics, the same bits every time.
       |x_ij - <q'_i, s_j>| <= c_i := M (|q' - q~| + |q'| r) + E |q~| (1 + r),   r = (d + 32) 2^-22
   with M = max |s_j| and E = max |s_j - s'_j|: 16 of the 32 are the 5 bits, below 2^-18 of x.
3. `candidates`, one program a query: with L the k-th largest of the best of the whole tiles' groups, k rows have
   x >= L, hence every row of the true top k has x >= L - 2c. A group whose second best is under that line holds at
   most one such row, its best; of any other group all 32 are taken. If they are more than a list holds, the query goes
   to `search_again`. In the last tile x is 0 beyond the bank's end: such a 0 raises no L, and what it hides is a second
   best.
4. `score`: the listed rows in float64, and the best k of them.

What is scored is a superset of the top k, as before; nothing else has to be proven.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .configs import GROUPED
from .shared import (
    EMPTY,
    INTERPRETED,
    empty_keys,
    largest_norm,
    load_row,
    load_tile,
    pack_key,
    processors,
    row_pointer,
    row_warps,
    store_best,
)

MAGIC = tl.constexpr(0x314455434653)  # first word of a packed bank, as csrc/kernels/cuda/screen.cuh writes it
HEADER_BYTES, FACTS = 16, 4  # of a packed bank: header, then (scale, norm, error, -) of each row, then the rows
LANES = tl.constexpr(8)  # groups of a tile; wgmma gives a thread every eighth pair of columns, so no data moves
PLACE_ERROR = 24 * 2.0**-22  # what r has here beyond `relative_error`
MERGED = 32 if INTERPRETED else 1024  # groups' best values that `candidates` looks at together
LISTED = 128 if INTERPRETED else 512  # rows that are scored for one query at most, with room for some whole groups
WORKSPACE = 256 << 20  # bytes of the groups' values of one launch: more queries go in parts
FEWEST = 256  # queries of a part
SCORED_ROWS, SCORED_WIDTH = 16, 128


class Screened(NamedTuple):
    """What the tensor cores read of a bank."""

    rows: Tensor  # [N, d] float16 or bfloat16
    facts: Tensor  # [N, 4] float32: scale of the row, |s_j|, |s_j - s'_j|
    header: Tensor | None  # of a packed bank


@triton.jit
def copy_kernel(bank, rows, facts, width, COPY: tl.constexpr, BLOCK: tl.constexpr):
    """facts of one row of the bank and, if COPY, its fp16 copy."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    s = load_row(bank, row, width, BLOCK, tl.float64)
    tl.store(facts + row * 4 + 1, (tl.sqrt(tl.sum(s * s, axis=0)) * (1 + 1e-6)).to(tl.float32))
    if COPY:
        scale = tl.max(tl.abs(s), axis=0)
        copy = (s * tl.where(scale > 0, 1.0 / scale, 0.0)).to(tl.float32).to(tl.float16)
        tl.store(row_pointer(rows, row, width) + columns, copy, mask=columns < width)
        error = s - scale * copy.to(tl.float64)
        tl.store(facts + row * 4, scale.to(tl.float32))
        tl.store(facts + row * 4 + 2, (tl.sqrt(tl.sum(error * error, axis=0)) * (1 + 1e-6)).to(tl.float32))


@triton.jit
def largest_kernel(facts, header, squares, errors, bank_rows, split_rows, ERRORS: tl.constexpr, HEADER: tl.constexpr):
    """squares [splits] = max |s_j|^2 and errors [splits] = max |s_j - s'_j| of each split."""
    split = tl.program_id(0)
    first = split * split_rows
    last = tl.minimum(first + split_rows, bank_rows)
    norm = tl.zeros([1024], tl.float32)
    error = tl.zeros([1024], tl.float32)
    for begin in range(first, last, 1024):
        row = begin + tl.arange(0, 1024)
        fact = facts + row.to(tl.int64) * 4
        norm = tl.maximum(norm, tl.load(fact + 1, mask=row < last, other=0.0))
        if ERRORS:
            error = tl.maximum(error, tl.load(fact + 2, mask=row < last, other=0.0))
    largest = tl.max(norm, axis=0)
    if HEADER:  # another layout, or none: no bound holds, and every row is scored
        largest = tl.where(tl.load(header) == MAGIC, largest, float("inf"))
    tl.store(squares + split, largest * largest * (1 + 1e-3) + 1e-34)
    tl.store(errors + split, tl.max(error, axis=0))


@triton.jit
def best_two(a, a_second, b, b_second):
    """The two largest of two sets, from the two largest of each."""
    return tl.maximum(a, b), tl.maximum(tl.minimum(a, b), tl.maximum(a_second, b_second))


@triton.jit(do_not_specialize=["rows", "tiles", "row_blocks"])
def screen_groups_kernel(
    scaled, columns, facts, best, second, rows, bank_rows, width, groups, row_blocks, tiles, place_bits,
    SCALED: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, BLOCK_WIDTH: tl.constexpr,
):  # fmt: skip
    """best, second [Q, groups]; scaled and columns are descriptors. Neighbors in time read the same rows of the bank.

    Beyond the bank's last row x is 0, as TMA fills it; `candidates_kernel` knows.
    """
    members: tl.constexpr = BLOCK_COLUMNS // LANES
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=True):
        first_row = tile % row_blocks * BLOCK_ROWS
        first = tile // row_blocks * BLOCK_COLUMNS
        x = tl.zeros([BLOCK_ROWS, BLOCK_COLUMNS], tl.float32)
        for begin in range(0, width, BLOCK_WIDTH):
            left = scaled.load([first_row, begin])
            right = columns.load([first, begin])
            x = tl.dot(left, right.T, x)
        column = tl.arange(0, BLOCK_COLUMNS)
        if SCALED:
            fact = facts + (first + column).to(tl.int64) * 4
            x = x * tl.load(fact, mask=column < bank_rows - first, other=0.0)[None, :]
        # place_bits = -members, an argument so that this is one instruction
        bits = (x.to(tl.int32, bitcast=True) & place_bits) | (column // LANES)[None, :]
        x = bits.to(tl.float32, bitcast=True)
        x = tl.reshape(x, [BLOCK_ROWS, members, LANES])
        largest, next_largest = tl.reduce((x, tl.full(x.shape, float("-inf"), tl.float32)), 1, best_two)
        row = first_row + tl.arange(0, BLOCK_ROWS)
        place = row.to(tl.int64)[:, None] * groups + first // members + tl.arange(0, LANES)[None, :]
        tl.store(best + place, largest, mask=(row < rows)[:, None])
        tl.store(second + place, next_largest, mask=(row < rows)[:, None])


@triton.jit
def kth_largest(values, K: tl.constexpr):
    """The K-th largest of values [C] float32, found bit by bit in 32 counts."""
    if K == 1:
        return tl.max(values, axis=0)
    bits = values.to(tl.int32, bitcast=True)
    ordered = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.uint32, bitcast=True) ^ 0x80000000
    largest = tl.full([], 0, tl.uint32)
    bit = tl.full([], 0x80000000, tl.uint32)
    for _ in range(32):
        trial = largest | bit
        largest = tl.where(tl.sum((ordered >= trial).to(tl.int32), axis=0) >= K, trial, largest)
        bit = bit >> 1
    found = (largest ^ 0x80000000).to(tl.int32, bitcast=True)
    return tl.where(found < 0, found ^ 0x7FFFFFFF, found).to(tl.float32, bitcast=True)


@triton.jit
def candidates_kernel(
    best, second, squares, errors, slack, length, scores, listed, counts, again, again_count, whole, groups, splits,
    K: tl.constexpr, MEMBERS: tl.constexpr, CAPACITY: tl.constexpr, SPLITS: tl.constexpr, MERGED: tl.constexpr,
):  # fmt: skip
    """Step 3, for one query: listed [Q, CAPACITY] and counts [Q], -1 where it goes to `again`.

    Of the groups, the first `whole` are of whole tiles.
    """
    row = tl.program_id(0).to(tl.int64)
    split = tl.arange(0, SPLITS)
    farthest = tl.max(tl.load(errors + split, mask=split < splits, other=0.0), axis=0)
    of_query = tl.load(slack + row)
    norm = tl.load(length + row)
    # 1.001: q' for q~, r of r, and the roundings of these lines
    c = 1.001 * (of_query * largest_norm(squares, splits, SPLITS) + farthest * (norm + of_query))
    merged = tl.full([MERGED], float("-inf"), tl.float32)
    for begin in range(0, whole, MERGED):  # each place of `merged` stands for other rows than the next
        group = begin + tl.arange(0, MERGED)
        merged = tl.maximum(merged, tl.load(best + row * groups + group, mask=group < whole, other=float("-inf")))
    kth = kth_largest(tl.where(merged == merged, merged, float("-inf")), K)
    line = kth - 2.001 * c
    count = tl.full([], 0, tl.int32)
    to = listed + row * CAPACITY
    for begin in range(0, groups, MERGED):
        group = begin + tl.arange(0, MERGED)
        found = tl.load(best + row * groups + group, mask=group < groups, other=float("-inf"))
        rest = tl.load(second + row * groups + group, mask=group < groups, other=float("-inf"))
        first = (group // LANES) * (MEMBERS * LANES) + group % LANES  # the group's rows are this + 0, 8, 16 ...
        several = rest >= line
        single = (found >= line) & (several == 0)
        slot = count + tl.cumsum(single.to(tl.int32), axis=0) - 1
        place = found.to(tl.int32, bitcast=True) & (MEMBERS - 1)
        tl.store(to + slot, first + place * LANES, mask=single & (slot < CAPACITY))
        count += tl.sum(single.to(tl.int32), axis=0)
        member = tl.arange(0, MEMBERS)
        open_groups = several
        while (tl.max(open_groups.to(tl.int32), axis=0) > 0) & (count <= CAPACITY):
            chosen = tl.min(tl.where(open_groups, group, 0x7FFFFFFF), axis=0)
            of_group = (chosen // LANES) * (MEMBERS * LANES) + chosen % LANES
            tl.store(to + count + member, of_group + member * LANES, mask=count + member < CAPACITY)
            count += MEMBERS
            open_groups = open_groups & (group != chosen)
    # a bound this large may come with an x that overflowed
    closed = (norm > 0) & ((count > CAPACITY) | (c >= 1e30) | (c != c))
    if closed:
        tl.store(again + tl.atomic_add(again_count, 1), row.to(tl.int32))
        known = tl.where(c < 1e30, (kth - 1.01 * c) / norm, float("-inf"))  # k rows have at least this score
        tl.store(scores + row * K + K - 1, known)
    tl.store(counts + row, tl.where(closed, -1, tl.where(norm > 0, count, 0)))


@triton.jit
def score_kernel(
    query, bank, listed, counts, keys, scores, indices, bank_rows, width,
    K: tl.constexpr, BEST: tl.constexpr, CAPACITY: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
):  # fmt: skip
    """Step 4, for one query; keys [Q, CAPACITY] is its scratch."""
    row = tl.program_id(0).to(tl.int64)
    count = tl.load(counts + row)
    if count >= 0:
        q = load_row(query, row, width, BLOCK, tl.float64)
        norm = tl.sqrt(tl.sum(q * q, axis=0))
        if norm == 0:  # every score is 0, so the first k rows win
            first = tl.arange(0, BEST)
            best_keys = pack_key(tl.zeros([BEST], tl.float32), first)
            store_best(best_keys, K, scores + row * K, indices + row * K, bank_rows - 1)
        else:
            for begin in range(0, count, ROWS):
                slot = begin + tl.arange(0, ROWS)
                index = tl.load(listed + row * CAPACITY + slot, mask=slot < count, other=0)
                inside = (slot < count) & (index < bank_rows)
                product = tl.zeros([ROWS, BLOCK_WIDTH], tl.float64)
                for left in range(0, width, BLOCK_WIDTH):
                    columns = left + tl.arange(0, BLOCK_WIDTH)
                    part = tl.load(query + row * width + columns, mask=columns < width, other=0.0).to(tl.float64)
                    product += load_tile(bank, index.to(tl.int64), inside, columns, width, tl.float64) * part[None, :]
                exact = (tl.sum(product, axis=1) / norm).to(tl.float32)
                tl.store(keys + row * CAPACITY + slot, tl.where(inside, pack_key(exact, index), EMPTY),
                         mask=slot < count)  # fmt: skip
            tl.debug_barrier()  # other threads read what was written
            slot = tl.arange(0, CAPACITY)
            nothing = tl.reshape(empty_keys(1, CAPACITY), [CAPACITY])
            found = tl.load(keys + row * CAPACITY + slot, mask=slot < count, other=EMPTY)
            store_best(tl.maximum(found, nothing), K, scores + row * K, indices + row * K, bank_rows - 1)


def packed_parts(bank: Tensor, packed: Tensor | None) -> Screened | None:
    """The fp16 copy in a bank packed for the CUDA kernels; None where it is none."""
    count, width = bank.shape
    facts = count * FACTS * 4
    if packed is None or packed.numel() != HEADER_BYTES + facts + count * 2 * width or packed.data_ptr() % 16:
        return None
    end = HEADER_BYTES + facts
    of_rows = packed[HEADER_BYTES:end].view(torch.float32).view(count, FACTS)
    return Screened(packed[end:].view(torch.float16).view(count, width), of_rows, packed[:8].view(torch.int64))


def screened(bank: Tensor, packed: Tensor | None) -> Screened:
    """The packed copy, the bank itself if it is 16-bit, or a copy made now."""
    copy = bank.dtype == torch.float32
    parts = packed_parts(bank, packed) if copy else None
    if parts is not None:
        return parts
    count, width = bank.shape
    rows = torch.empty_like(bank, dtype=torch.float16) if copy else bank
    facts = bank.new_empty((count, FACTS), dtype=torch.float32)
    block = triton.next_power_of_2(width)
    copy_kernel[(count,)](bank, rows, facts, width, COPY=copy, BLOCK=block, num_warps=row_warps(block))
    return Screened(rows, facts, None)


def capacity_for(k: int) -> int:
    """LISTED, or more for many neighbors: a power of two (registers)."""
    return max(LISTED, triton.next_power_of_2(4 * k))


def most_queries(bank_rows: int) -> int:
    """Queries of one launch, so that the groups' values fit WORKSPACE."""
    block = GROUPED.kwargs["BLOCK_ROWS"]
    a_query = 8 * LANES.value * triton.cdiv(bank_rows, GROUPED.kwargs["BLOCK_COLUMNS"])
    return max(FEWEST, WORKSPACE // a_query // block * block)


def screen_and_score(
    query: Tensor, bank: Tensor, k: int, of: Screened, scaled: Tensor, length: Tensor, slack: Tensor,
    squares: Tensor, split_rows: int, again: Tensor, again_count: Tensor, scores: Tensor, indices: Tensor,
) -> None:  # fmt: skip
    """Steps 2 to 4: fills squares [splits], and scores and indices [Q, k] or the list `again`."""
    (rows, width), bank_rows, splits = query.shape, len(bank), len(squares)
    tile = GROUPED.kwargs
    columns, lanes = tile["BLOCK_COLUMNS"], LANES.value
    members, blocks = columns // lanes, triton.cdiv(rows, tile["BLOCK_ROWS"])
    groups, capacity = triton.cdiv(bank_rows, columns) * lanes, capacity_for(k)
    errors = torch.empty_like(squares)
    best, second = query.new_empty((2, rows, groups), dtype=torch.float32)
    listed = query.new_empty((rows, capacity), dtype=torch.int32)
    keys = query.new_empty((rows, capacity), dtype=torch.int64)
    counts = query.new_empty(rows, dtype=torch.int32)
    copied = bank.dtype == torch.float32
    largest_kernel[(splits,)](
        of.facts, of.facts if of.header is None else of.header, squares, errors, bank_rows, split_rows,
        ERRORS=copied, HEADER=of.header is not None, num_warps=4,
    )  # fmt: skip
    tiles = blocks * groups // lanes
    screen_groups_kernel[(min(tiles, processors(query)),)](
        TensorDescriptor.from_tensor(scaled, [tile["BLOCK_ROWS"], tile["BLOCK_WIDTH"]]),
        TensorDescriptor.from_tensor(of.rows, [columns, tile["BLOCK_WIDTH"]]),
        of.facts, best, second, rows, bank_rows, width, groups, blocks, tiles, -members, SCALED=copied,
        num_warps=GROUPED.num_warps, num_stages=GROUPED.num_stages, **tile,
    )  # fmt: skip
    candidates_kernel[(rows,)](
        best, second, squares, errors, slack, length, scores, listed, counts, again, again_count,
        bank_rows // columns * lanes, groups, splits,
        K=k, MEMBERS=members, CAPACITY=capacity, SPLITS=triton.next_power_of_2(splits),
        MERGED=max(triton.next_power_of_2(k), min(MERGED, triton.next_power_of_2(groups))), num_warps=4,
    )  # fmt: skip
    block = triton.next_power_of_2(width)
    score_kernel[(rows,)](
        query, bank, listed, counts, keys, scores, indices, bank_rows, width,
        K=k, BEST=triton.next_power_of_2(k), CAPACITY=capacity, BLOCK=block, ROWS=SCORED_ROWS,
        BLOCK_WIDTH=SCORED_WIDTH, num_warps=4,
    )  # fmt: skip
