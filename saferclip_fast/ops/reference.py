"""The ground truth: every op in plain PyTorch, by the closed forms of docs/method.md. Slow by design.

In float64 these functions are what all other backends are tested against. Memory is bounded by chunking: nothing of
size [B, N] or [B, B] is stored. Autocast is off inside, so that a bf16 region does not change what the ops mean.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .checks import near_one, shifted

CHUNK_ELEMENTS = 1 << 22  # entries of one temporary: 32 MiB in float64


def _without_autocast(function: Callable) -> Callable:
    @functools.wraps(function)
    def wrapped(first: Tensor, *args, **kwargs):
        with torch.autocast(first.device.type, enabled=False):
            return function(first, *args, **kwargs)

    return wrapped


def _chunk(columns: int) -> int:
    return max(1, CHUNK_ELEMENTS // max(1, columns))


def _sortable_key(scores: Tensor, indices: Tensor) -> Tensor:
    """int64 keys whose descending order is: higher float32 score first, then lower index."""
    bits = (scores + 0.0).view(torch.int32).to(torch.int64)  # + 0.0 makes -0.0 equal to 0.0
    ordered = torch.where(bits < 0, -(bits & 0x7FFFFFFF), bits)
    return (ordered << 32) + (0xFFFFFFFF - indices)


def _from_key(keys: Tensor) -> tuple[Tensor, Tensor]:
    ordered = keys >> 32
    bits = torch.where(ordered < 0, (-ordered) | -0x80000000, ordered)
    return bits.to(torch.int32).view(torch.float32), 0xFFFFFFFF - (keys & 0xFFFFFFFF)


@_without_autocast
def nearest_safe(query: Tensor, bank: Tensor, k: int, packed: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Exact top-k: score_ij = float32(<q_i, s_j> / |q_i|), summed in float64; ties go to the lower index.

    query [Q, d] of any scale, bank [N, d] as it is. Returns scores float32 [Q, k], best first, and int64 indices.
    """
    count = bank.shape[0]
    scores = query.new_empty((query.shape[0], k), dtype=torch.float32)
    indices = query.new_empty((query.shape[0], k), dtype=torch.int64)
    columns = min(count, _chunk(max(bank.shape[1], 1024)))
    step = _chunk(columns)
    for begin in range(0, query.shape[0], step):
        unit, _ = _unit(query[begin : begin + step], torch.float64)
        best = unit.new_empty((unit.shape[0], 0), dtype=torch.int64)
        for left in range(0, count, columns):
            chunk = bank[left : left + columns].double()
            index = torch.arange(left, left + chunk.shape[0], device=bank.device)
            keys = _sortable_key((unit @ chunk.T).float(), index)
            best = torch.cat([best, keys], dim=1)
            best = best.topk(min(k, best.shape[1]), dim=1).values
        scores[begin : begin + step], indices[begin : begin + step] = _from_key(best)
    return scores, indices


class _Inverse(NamedTuple):
    """1/|x| of rows, [rows, 1], as value times 2^-exponent: alone it may be out of range."""

    value: Tensor
    exponent: Tensor


def _unit(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, _Inverse]:
    """Rows of x of any scale at length 1 (a zero row stays zero) and 1/|x|, both in `dtype`."""
    x, exponent = near_one(x.to(dtype))
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    inverse = torch.where(norm > 0, 1 / norm, 0.0)
    return x * inverse, _Inverse(inverse, exponent)


def _through_norm(g: Tensor, unit: Tensor, inverse: _Inverse) -> Tensor:
    """d/dx from d/du for u = x/|x|: (g - (g.u) u) / |x|."""
    return shifted((g - (g * unit).sum(-1, keepdim=True) * unit) * inverse.value, -inverse.exponent)


@_without_autocast
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
    weights: Sequence[float],
    beta: float,
    margin: float,
    current_negative: bool,
    need_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The four redirection terms and their closed-form gradients (docs/method.md, "The gradient")."""
    wide = torch.float64 if text.dtype == torch.float64 else torch.float32
    batch, width = text.shape
    terms = text.new_zeros(4, dtype=wide)
    grad_text = text.new_empty((batch if need_grad else 0, width))
    grad_image = torch.empty_like(grad_text)
    step = _chunk(width * neighbors.shape[1])
    for begin in range(0, batch, step):
        index = slice(begin, begin + step)
        u_t, inverse_t = _unit(text[index], wide)
        u_v, inverse_v = _unit(image[index], wide)
        w = neighbor_weights[index].to(wide).unsqueeze(1)
        s_t = (w @ bank_text[neighbors[index]].to(wide)).squeeze(1)
        s_v = (w @ bank_image[neighbors[index]].to(wide)).squeeze(1)
        away_t = u_v if current_negative else _unit(frozen_image[index], wide)[0]
        away_v = u_t if current_negative else _unit(frozen_text[index], wide)[0]
        x_t = beta * ((u_t * (away_t - s_v)).sum(-1) + margin)
        x_v = beta * ((u_v * (away_v - s_t)).sum(-1) + margin)
        per_row = torch.stack(
            [1 - (u_t * s_t).sum(-1), 1 - (u_v * s_v).sum(-1), F.softplus(x_t) / beta, F.softplus(x_v) / beta]
        )
        rw = row_weights[index].to(wide).T
        terms += (rw * per_row).sum(1)
        if need_grad:
            w = (rw * terms.new_tensor(weights).unsqueeze(1)).unsqueeze(-1)
            g_t = w[2] * torch.sigmoid(x_t).unsqueeze(-1) * (away_t - s_v) - w[0] * s_t
            g_v = w[3] * torch.sigmoid(x_v).unsqueeze(-1) * (away_v - s_t) - w[1] * s_v
            grad_text[index] = _through_norm(g_t, u_t, inverse_t).to(text.dtype)
            grad_image[index] = _through_norm(g_v, u_v, inverse_v).to(text.dtype)
    return (terms * terms.new_tensor(weights)).sum(), terms, grad_text, grad_image


def _log_sums(u: Tensor, v: Tensor, mask: Tensor | None, first: int, logit_scale: float) -> tuple[Tensor, Tensor]:
    """What `info_nce_sums` says, of rows at length 1."""
    lowest = torch.finfo(u.dtype).min  # not -inf, which minus -inf is NaN
    own = slice(first, first + len(u))
    row_lse = u.new_empty(len(u))
    column_lse = u.new_full((len(v),), lowest)
    step = _chunk(len(v))
    for begin in range(0, len(u), step):
        index = slice(begin, begin + step)
        logits = logit_scale * (u[index] @ v.T)
        of_row, of_column = logits, logits
        if mask is not None:
            of_row = logits.masked_fill(~mask, lowest)
            of_column = logits.masked_fill(~mask[own][index].unsqueeze(1), lowest)
        row_lse[index] = of_row.logsumexp(1)
        column_lse = torch.logaddexp(column_lse, of_column.logsumexp(0))
    rows = torch.stack([row_lse, torch.zeros_like(row_lse), logit_scale * (u * v[own]).sum(-1)])
    return rows, torch.stack([column_lse, torch.ones_like(column_lse)])


def _info_nce(
    u: Tensor,
    v: Tensor,
    mask: Tensor | None,
    rows: Tensor,
    columns: Tensor,
    first: int,
    logit_scale: float,
    need_grad: bool,
) -> tuple[Tensor, Tensor]:
    """The loss of rows at length 1, and d/du as if their length were free, [0, d] unless wanted."""
    own = slice(first, first + len(u))
    chosen = torch.ones(len(v), dtype=torch.bool, device=v.device) if mask is None else mask
    count = chosen.sum().clamp(min=1).to(u.dtype)
    row_lse, column_lse = rows[0] + rows[1], columns[0] + columns[1]
    halves = [(lse - rows[2]).where(chosen[own], 0.0).sum() / count for lse in (row_lse, column_lse[own])]
    grad = u.new_empty((len(u) if need_grad else 0, u.shape[1]))
    step = _chunk(len(v))
    for begin in range(0, len(grad), step):
        index = slice(begin, begin + step)
        logits = logit_scale * (u[index] @ v.T)
        p = (logits - row_lse[index].unsqueeze(1)).exp() + (logits - column_lse).exp()
        g = (0.5 * logit_scale / count) * (p.where(chosen, 0.0) @ v - 2 * v[own][index])
        grad[index] = g.where(chosen[own][index].unsqueeze(1), 0.0)
    return 0.5 * (halves[0] + halves[1]), grad


@_without_autocast
def info_nce_sums(
    x: Tensor, y: Tensor, mask: Tensor | None, first: int, logit_scale: float, keep: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-sum-exps of S = logit_scale x y^T over the chosen columns and over the chosen rows of x.

    x [M, d] and y [B, d] of any scale; the counterpart of row i is row first + i of y, and mask [B] chooses.

    Returns rows [3, M] (largest, log, diagonal) and columns [2, B] (largest, sum), where largest + log and
    largest + log(sum) are the log-sum-exps: here all of it is in `largest`. Keeps no logits: [0, B].
    """
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    rows, columns = _log_sums(_unit(x, wide)[0], _unit(y, wide)[0], mask, first, logit_scale)
    return rows, columns, rows.new_empty((0, len(y)))


@_without_autocast
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
    """The loss of the chosen rows of x over the number of all, and d/dx.

    rows and columns are those of `info_nce_sums`, but columns hold (largest, log) over the rows of all processes.
    `logits` are a kernel's own and not read.
    """
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    u, inverse = _unit(x, wide)
    loss, g = _info_nce(u, _unit(y, wide)[0], mask, rows, columns, first, logit_scale, need_grad)
    return loss, _through_norm(g, u, inverse).to(x.dtype) if need_grad else x.new_empty((0, x.shape[1]))


@_without_autocast
def preservation_loss(
    text: Tensor,
    image: Tensor,
    frozen_text: Tensor,
    frozen_image: Tensor,
    weights: Sequence[float],
    logit_scale: float,
    need_grad: bool,
    logits_mib: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Cosine preservation and symmetric InfoNCE against the frozen encoders, with closed-form gradients."""
    wide = torch.float64 if text.dtype == torch.float64 else torch.float32
    frozen = [_unit(frozen_text, wide)[0], _unit(frozen_image, wide)[0]]
    batch = text.shape[0]
    terms = text.new_zeros(4, dtype=wide)
    grads = []
    for j, x in enumerate((text, image)):
        unit, inverse = _unit(x, wide)
        own, other = frozen[j], frozen[1 - j]
        terms[j] = (1 - (unit * own).sum(-1)).mean()
        g = -(weights[j] / batch) * own
        if weights[2 + j] != 0:
            rows, columns = _log_sums(unit, other, None, 0, logit_scale)
            columns = torch.stack([columns[0], columns[1].log()])
            terms[2 + j], nce = _info_nce(unit, other, None, rows, columns, 0, logit_scale, need_grad)
            if need_grad:
                g = g + weights[2 + j] * nce
        grads.append(_through_norm(g, unit, inverse).to(x.dtype) if need_grad else x.new_empty((0, x.shape[1])))
    return (terms * terms.new_tensor(weights)).sum(), terms, grads[0], grads[1]


@_without_autocast
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
    """The hinge over found rows: linear where it is open, so that the sum of the open rows gives value and gradient."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    width = x.shape[1]
    values = x.new_empty(len(x), dtype=wide)
    grad = x.new_empty((len(x) if need_grad else 0, width))
    step = _chunk(rows.shape[1] * indices.shape[1])
    for begin in range(0, len(x), step):
        index = slice(begin, begin + step)
        u, inverse = _unit(x[index], wide)
        is_open = (2 * scores[index].double() + margin > 0).to(wide)
        slope = (is_open.unsqueeze(1) @ rows[indices[index]].to(wide)).squeeze(1) * (math.sqrt(2) / k)
        values[index] = (u * slope[:, :width]).sum(-1) + slope[:, width] + (margin / k) * is_open.sum(1)
        if need_grad:
            g = row_weights[index].to(wide).unsqueeze(1) * slope[:, :width]
            grad[index] = _through_norm(g, u, inverse).to(x.dtype)
    return (row_weights.to(wide) * values).sum(), values, grad
