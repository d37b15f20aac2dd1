"""Exact nearest-safe search: the tensor cores screen, float64 decides, and a proof separates the two.

The op's score is s_ij = float32(<q_i, s_j> / |q_i|), summed in float64; ties go to the lower index. Steps:

1. `prepare`: q' = q * 2^-e with 1 <= |q'| < 2, rounded to the bank's dtype: q~. A power of two changes no mantissa,
   so q~ = q' but for queries of a wider dtype than the bank's, whose rounding error |q' - q~| is measured in float64.
2. `screen`: x_ij = <q~_i, s_j> on the tensor cores, and the KEEP largest x_ij of each of the bank's splits. With
   M = max_j |s_j| (taken in the same pass),
       |x_ij - <q'_i, s_j>| <= c_i := M (|q' - q~| + |q'| r),   r = (d + 8) 2^-22 + [bank is float32] 2^-9 (1 + 2^-7)
   by Cauchy-Schwarz: tensor-core accumulation truncates, with an error below 2^-22 of sum_l |q_l s_l| <= |q||s| an
   addition (twice what has been observed of any generation); TF32 drops 13 bits of each operand, under 2^-10 each.
   The 8 more cover the float32 roundings of norms, lines and of the scores themselves.
3. `decide`, one program a query: with L the k-th largest kept x, k rows have <q', s> >= L - c, hence every row of the
   true top k has x >= L - 2c. All kept rows above that line are scored in float64 and the best k are written. If in
   each split the smallest kept x is below the line, so is everything that the split dropped: the answer is proven.
   Otherwise (many near-equal rows) the query's number is appended to a list.
4. `search_again`, for the queries on that list: the same products, and every row with x + c >= the k-th best exact
   score known so far is scored in float64 on the spot, so nothing has to be proven afterwards. `merge_again` joins the
   splits. Both read the list's length on the device: there is no host synchronization, and an empty list costs two
   small launches.

Stored per query: KEEP keys a split, at most MAX_SLOTS in all, whatever N is.

`grouped_screen.py` has another way for steps 2 and 3, of large batches on Hopper and data-center Blackwell.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..backends import MAX_NATIVE_K
from .configs import SCREEN, takes_groups, tuned
from .grouped_screen import PLACE_ERROR, Screened, most_queries, screen_and_score, screened
from .shared import (
    EMPTY,
    dot_tile,
    empty_keys,
    first_column,
    has_wide_tiles,
    insert_key,
    key_index,
    key_score,
    kth_largest_score,
    largest_norm,
    load_row,
    load_tile,
    merge_scores,
    on_device,
    pack_key,
    power_of_two_below,
    processors,
    row_pointer,
    row_warps,
    rows_per_block,
    screening_float32,
    store_best,
)

MAX_SLOTS = 4096  # kept keys a query; `decide` holds them all in registers
SLOT_WARPS = 8  # to hold them
SPARE = 4  # kept beyond k in each split, so that the proof nearly always succeeds
MOST_ROWS = 65_535 * 16  # of a launch: a grid's second dimension ends at 65,535 blocks, of 16 rows or more
AGAIN_ROWS, AGAIN_BANK, AGAIN_WIDTH = 16, 64, 64


@triton.jit
def prepare_kernel(query, scaled, length, slack, width, relative, BLOCK: tl.constexpr):
    """scaled = q~ [Q, d], length = |q'| [Q] and slack = c_i / M [Q], both float32 and rounded up."""
    row = tl.program_id(0)
    columns = tl.arange(0, BLOCK)
    q = load_row(query, row, width, BLOCK, tl.float64)
    norm = tl.sqrt(tl.sum(q * q, axis=0))
    scale = tl.where(norm > 0, 1.0 / power_of_two_below(norm), 0.0)
    rounded = (q * scale).to(tl.float32).to(scaled.dtype.element_ty)
    tl.store(scaled + row.to(tl.int64) * width + columns, rounded, mask=columns < width)
    error = q * scale - rounded.to(tl.float64)
    lost = tl.sqrt(tl.sum(error * error, axis=0))
    tl.store(length + row, (norm * scale).to(tl.float32))
    tl.store(slack + row, ((lost + norm * scale * relative) * (1 + 1e-6)).to(tl.float32))


@triton.jit
def _screen(
    scaled, first_row, rows, columns, first, last, width,
    KEEP: tl.constexpr, PRECISION: tl.constexpr, SQUARES: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, BLOCK_WIDTH: tl.constexpr,
):  # fmt: skip
    """Keys [BLOCK_ROWS, KEEP] of the largest x_ij over bank rows [first, last), and there (if SQUARES) max |s_j|^2."""
    keys = empty_keys(BLOCK_ROWS, KEEP)
    largest = tl.zeros([BLOCK_COLUMNS], tl.float32)
    row = tl.arange(0, BLOCK_ROWS)
    bank_row = tl.arange(0, BLOCK_COLUMNS)
    for begin in range(first, last, BLOCK_COLUMNS):
        x, squares = dot_tile(
            row_pointer(scaled, first_row, width), row, row < rows - first_row,
            row_pointer(columns, begin, width), bank_row, bank_row < last - begin, width,
            BLOCK_ROWS, BLOCK_COLUMNS, BLOCK_WIDTH, columns.dtype.element_ty, PRECISION, SQUARES,
        )  # fmt: skip
        largest = tl.maximum(largest, squares)
        keys = merge_scores(keys, tl.where((bank_row < last - begin)[None, :], x, float("-inf")), begin)
    return keys, tl.max(largest, axis=0)


@tuned(SCREEN, key=["width", "KEEP", "BLOCK_ROWS"])
@triton.jit(do_not_specialize=["rows", "split_rows"])
def screen_kernel(
    scaled, columns, kept, squares, rows, bank_rows, width, split_rows,
    KEEP: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, BLOCK_WIDTH: tl.constexpr,
):  # fmt: skip
    """kept [Q, splits, KEEP]: keys of the largest x_ij in this split; squares [splits]: its max |s_j|^2.

    columns is the bank. The first block of queries takes the squares along, from tiles that it loads anyway.
    """
    split = tl.program_id(0)
    first = split * split_rows
    last = tl.minimum(first + split_rows, bank_rows)
    first_row = tl.program_id(1) * BLOCK_ROWS
    if tl.program_id(1) == 0:
        keys, largest = _screen(scaled, first_row, rows, columns, first, last, width, KEEP, PRECISION, True,
                                BLOCK_ROWS, BLOCK_COLUMNS, BLOCK_WIDTH)  # fmt: skip
        tl.store(squares + split, largest * (1 + 1e-3) + 1e-34)  # rounding, and squares that underflow
    else:
        keys, largest = _screen(scaled, first_row, rows, columns, first, last, width, KEEP, PRECISION, False,
                                BLOCK_ROWS, BLOCK_COLUMNS, BLOCK_WIDTH)  # fmt: skip
    row = first_row + tl.arange(0, BLOCK_ROWS)
    place = (row.to(tl.int64) * tl.num_programs(0) + split)[:, None] * KEEP + tl.arange(0, KEEP)[None, :]
    tl.store(kept + place, keys, mask=(row < rows)[:, None])


@triton.jit
def decide_kernel(
    query, bank, kept, squares, slack, scores, indices, again, again_count, bank_rows, width, splits, split_rows,
    K: tl.constexpr, KEEP: tl.constexpr, SPLITS: tl.constexpr, BEST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Step 3 of the file's docstring, for one query."""
    row = tl.program_id(0).to(tl.int64)
    split = tl.arange(0, SPLITS)
    slot = split[:, None] * KEEP + tl.arange(0, KEEP)[None, :]
    keys = tl.load(kept + row * splits * KEEP + slot, mask=(split < splits)[:, None], other=EMPTY)
    c = tl.load(slack + row) * largest_norm(squares, splits, SPLITS)
    flat = tl.reshape(keys, [SPLITS * KEEP])
    line = kth_largest_score(flat, K) - 2.001 * c  # .001: the rounding of this line itself
    full_of_survivors = (key_score(tl.min(keys, axis=1)) >= line) & (bank_rows - split * split_rows > KEEP)
    unproven = tl.max(full_of_survivors.to(tl.int32), axis=0) > 0

    q = load_row(query, row, width, BLOCK, tl.float64)
    norm = tl.sqrt(tl.sum(q * q, axis=0))
    if norm == 0:  # every score is 0, so the first k rows win
        best = tl.arange(0, BEST)
        best_keys = pack_key(tl.zeros([BEST], tl.float32), best)
    else:
        if unproven:
            tl.store(again + tl.atomic_add(again_count, 1), row.to(tl.int32))
        best_keys = empty_keys(1, BEST)
        flat = tl.where(key_score(flat) >= line, flat, EMPTY)
        top = tl.max(flat, axis=0)
        while top > EMPTY + KEEP:
            index = key_index(top)
            product = tl.sum(q * load_row(bank, index, width, BLOCK, tl.float64), axis=0)
            exact = tl.full([1], 0, tl.float64) + product / norm
            best_keys = insert_key(best_keys, pack_key(exact.to(tl.float32), tl.full([1], 0, tl.int64) + index))
            flat = tl.where(flat == top, EMPTY, flat)
            top = tl.max(flat, axis=0)
        best_keys = tl.reshape(best_keys, [BEST])
    store_best(best_keys, K, scores + row * K, indices + row * K, bank_rows - 1)


@triton.jit
def _exact_scores(query, rows, valid, bank, bank_rows, wanted, width, ROWS: tl.constexpr, BLOCK_WIDTH: tl.constexpr):
    """float32(<q_r, s_r> / |q_r|) in float64 for row pairs, [ROWS]."""
    product = tl.zeros([ROWS, BLOCK_WIDTH], tl.float64)
    square = tl.zeros([ROWS, BLOCK_WIDTH], tl.float64)
    for begin in range(0, width, BLOCK_WIDTH):
        columns = begin + tl.arange(0, BLOCK_WIDTH)
        q = load_tile(query, rows, valid & wanted, columns, width, tl.float64)
        product += q * load_tile(bank, bank_rows, wanted, columns, width, tl.float64)
        square += q * q
    norm = tl.sqrt(tl.sum(square, axis=1))
    return (tl.sum(product, axis=1) / tl.where(norm > 0, norm, 1.0)).to(tl.float32)


@triton.jit
def search_again_kernel(
    query, scaled, bank, kept, squares, slack, length, scores, again, again_count,
    k, bank_rows, width, splits, split_rows,
    KEEP: tl.constexpr, SPLITS: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_BANK: tl.constexpr, BLOCK_WIDTH: tl.constexpr,
):  # fmt: skip
    """Step 4: kept [Q, splits, KEEP] is filled anew, with exact keys, for the queries listed in `again`."""
    split = tl.program_id(0)
    first = split * split_rows
    last = tl.minimum(first + split_rows, bank_rows)
    largest = largest_norm(squares, splits, SPLITS)
    listed = tl.load(again_count)
    columns = tl.arange(0, BLOCK_BANK)
    for group in range(0, listed, ROWS):
        member = group + tl.arange(0, ROWS)
        valid = member < listed
        row = tl.load(again + member, mask=valid, other=0).to(tl.int64)
        c = tl.load(slack + row) * largest * 1.001 + 1e-30
        norm = tl.load(length + row)
        known = tl.load(scores + row * k + k - 1)  # the k-th best is at least this
        keys = empty_keys(ROWS, KEEP)
        for begin in range(first, last, BLOCK_BANK):
            inside = columns < last - begin
            x, _ = dot_tile(
                scaled, row, valid, row_pointer(bank, begin, width), columns, inside, width,
                ROWS, BLOCK_BANK, BLOCK_WIDTH, bank.dtype.element_ty, PRECISION, False,
            )  # fmt: skip
            x = tl.where(inside[None, :] & valid[:, None], x, float("-inf"))
            line = tl.maximum(known, key_score(tl.min(keys, axis=1))) * norm - c
            best = tl.max(x, axis=1)
            wanted = (best >= line) & (best > float("-inf"))
            while tl.max(wanted.to(tl.int32), axis=0) > 0:
                at = first_column(x, best)
                exact = _exact_scores(
                    query, row, valid, bank, (begin + at).to(tl.int64), wanted, width, ROWS, BLOCK_WIDTH
                )
                keys = insert_key(keys, tl.where(wanted, pack_key(exact, begin + at), EMPTY))
                x = tl.where(columns[None, :] == at[:, None], float("-inf"), x)
                line = tl.maximum(known, key_score(tl.min(keys, axis=1))) * norm - c
                best = tl.max(x, axis=1)
                wanted = (best >= line) & (best > float("-inf"))
        place = (row * splits + split)[:, None] * KEEP + tl.arange(0, KEEP)[None, :]
        tl.store(kept + place, keys, mask=valid[:, None])


@triton.jit
def merge_again_kernel(
    kept, scores, indices, again, again_count, k, bank_rows, splits, KEEP: tl.constexpr, SPLITS: tl.constexpr
):
    """The best k of the splits' exact keys, for the queries listed in `again`."""
    split = tl.arange(0, SPLITS)
    slot = split[:, None] * KEEP + tl.arange(0, KEEP)[None, :]
    for member in range(tl.program_id(0), tl.load(again_count), tl.num_programs(0)):
        row = tl.load(again + member).to(tl.int64)
        keys = tl.load(kept + row * splits * KEEP + slot, mask=(split < splits)[:, None], other=EMPTY)
        store_best(tl.reshape(keys, [SPLITS * KEEP]), k, scores + row * k, indices + row * k, bank_rows - 1)


def keep_for(k: int) -> int:
    """Keys kept a split: a power of two (registers), at least k + SPARE."""
    return max(8, triton.next_power_of_2(k + SPARE))


def split_bank(blocks: int, bank_rows: int, keep: int, device_processors: int) -> tuple[int, int]:
    """(splits, rows a split): about four programs a multiprocessor, none under 512 rows, MAX_SLOTS keys a query."""
    wanted = max(1, 4 * device_processors // blocks)
    splits = max(1, min(wanted, MAX_SLOTS // keep, triton.cdiv(bank_rows, 512)))
    split_rows = triton.cdiv(triton.cdiv(bank_rows, splits), 128) * 128
    return triton.cdiv(bank_rows, split_rows), split_rows


def relative_error(width: int, dtype: torch.dtype) -> float:
    """r of the file's docstring, for products of rows in dtype."""
    return (width + 8) * 2.0**-22 + (2.0**-9 * (1 + 2.0**-7) if dtype == torch.float32 else 0.0)


def prepare(query: Tensor, dtype: torch.dtype, relative: float) -> tuple[Tensor, Tensor, Tensor]:
    """Step 1: (scaled [Q, d], length [Q], slack [Q])."""
    rows, width = query.shape
    scaled = torch.empty_like(query, dtype=dtype)
    length, slack = query.new_empty((2, rows), dtype=torch.float32)
    block = triton.next_power_of_2(width)
    prepare_kernel[(rows,)](query, scaled, length, slack, width, relative, BLOCK=block, num_warps=row_warps(block))
    return scaled, length, slack


def _search(query: Tensor, bank: Tensor, k: int, of: Screened | None) -> tuple[Tensor, Tensor]:
    """The five steps, on the current device; `of` where groups are screened instead of a running top-k."""
    (rows, width), bank_rows = query.shape, bank.shape[0]
    scores = query.new_empty((rows, k), dtype=torch.float32)
    indices = query.new_empty((rows, k), dtype=torch.int64)
    if rows == 0:
        return scores, indices
    keep, block = keep_for(k), triton.next_power_of_2(width)
    block_rows = rows_per_block(rows, has_wide_tiles(query.device), keep)
    row_blocks = triton.cdiv(rows, block_rows)
    splits, split_rows = split_bank(row_blocks, bank_rows, keep, processors(query))
    padded = triton.next_power_of_2(splits)
    squares = query.new_empty(splits, dtype=torch.float32)
    kept = query.new_empty((rows, splits, keep), dtype=torch.int64)
    again = query.new_empty(rows, dtype=torch.int32)
    again_count = query.new_zeros(1, dtype=torch.int32)
    precision = screening_float32()  # only the screen: float64 decides
    scaled, length, slack = prepare(query, bank.dtype, relative_error(width, bank.dtype))
    if of is not None:
        halves = prepare(query, of.rows.dtype, relative_error(width, of.rows.dtype) + PLACE_ERROR)
        screen_and_score(query, bank, k, of, *halves, squares, split_rows, again, again_count, scores, indices)
    else:
        screen_kernel[(splits, row_blocks)](
            scaled, bank, kept, squares, rows, bank_rows, width, split_rows,
            KEEP=keep, PRECISION=precision, BLOCK_ROWS=block_rows,
        )  # fmt: skip
        decide_kernel[(rows,)](
            query, bank, kept, squares, slack, scores, indices, again, again_count,
            bank_rows, width, splits, split_rows,
            K=k, KEEP=keep, SPLITS=padded, BEST=triton.next_power_of_2(k), BLOCK=block, num_warps=SLOT_WARPS,
        )  # fmt: skip
    search_again_kernel[(splits,)](
        query, scaled, bank, kept, squares, slack, length, scores, again, again_count,
        k, bank_rows, width, splits, split_rows, KEEP=keep, SPLITS=padded, PRECISION=precision,
        ROWS=AGAIN_ROWS, BLOCK_BANK=AGAIN_BANK, BLOCK_WIDTH=AGAIN_WIDTH, num_warps=4,
    )  # fmt: skip
    merge_again_kernel[(min(rows, 4 * processors(query)),)](
        kept, scores, indices, again, again_count, k, bank_rows, splits,
        KEEP=keep, SPLITS=padded, num_warps=SLOT_WARPS,
    )  # fmt: skip
    return scores, indices


def nearest_safe(query: Tensor, bank: Tensor, k: int, packed: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """query [Q, d], bank [N, d], each float32, bfloat16 or float16 -> scores float32 [Q, k], indices int64 [Q, k].

    `packed`: the bank as the CUDA kernels pack it; read where groups are screened (`configs.takes_groups`).
    """
    if k > MAX_NATIVE_K:
        raise ValueError(f"k={k}: the triton backend returns at most {MAX_NATIVE_K} neighbors; use backend='reference'")
    if bank.dtype == torch.float64:
        raise ValueError("bank is float64: the triton backend takes float32, bfloat16 or float16; use bank.float()")
    query, bank = query.contiguous(), bank.contiguous()
    with on_device(query):
        of = screened(bank, packed) if takes_groups(query, bank, k) else None
        most = MOST_ROWS if of is None else most_queries(len(bank))
        parts = [_search(part, bank, k, of) for part in query.split(most)]
    if len(parts) == 1:
        return parts[0]
    return torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])
