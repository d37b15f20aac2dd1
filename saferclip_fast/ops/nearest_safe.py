"""Exact nearest-safe search: the k bank rows of highest cosine for each query."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from .arrays import as_array, as_rows, as_tensor
from .backends import MAX_NATIVE_K
from .checks import check_count, check_finite, check_matrix, check_unit_rows
from .choice import run


class Bank(Protocol):
    """The aligned safe rows that the ops read; `SafeBank` is one."""

    text: Tensor  # [N, d] unit rows
    image: Tensor  # [N, d] unit rows
    packed: Tensor | None  # what pack_bank made of `text`, if anything


class Neighbors(NamedTuple):
    """The k nearest safe rows of each query, best first."""

    scores: Tensor  # [Q, k] float32 cosine; [k] for a single query, NumPy arrays for one
    indices: Tensor  # [Q, k] int64 rows of the bank


def nearest_safe(
    query: Tensor | np.ndarray,
    bank: Bank | Tensor | np.ndarray,
    k: int = 1,
    *,
    backend: str = "auto",
    check: bool = True,
) -> Neighbors:
    """The k safe rows nearest to each query: s_ij = <q_i, s_j> / |q_i| (SafeR-CLIP, arXiv 2511.16743, section on
    proximity-based alignment; k = 1 is the paper's argmax).

    Exact: an index differs from the float64 one only where two scores agree within one float32 rounding; equal
    scores give the lower index; the result does not depend on the number of threads. Not differentiable.

    Args:
        query: [Q, d], or a single one [d], float64/32, bfloat16 or float16, rows of any scale (a zero row scores 0
            everywhere).
        bank: a `SafeBank` (its text rows are searched) or a tensor or NumPy array [N, d] of unit rows.
        k: neighbors wanted, 1 <= k <= N.
        backend: "auto", "reference", "cpu", "cuda" or "triton".
        check: validate shapes and values; `False` for hot loops on data known to be good.

    Returns:
        `Neighbors(scores, indices)`: [Q, k] float32 and [Q, k] int64, on the device of `query`; [k] for a single query,
        and NumPy arrays for one (it is searched where the bank lies).

    Raises:
        ValueError: k out of range, an empty bank, widths or devices that differ, NaN or Inf, bank rows not of unit
            length, an unknown backend.
        TypeError: no tensor, no bank, or a k that is no whole number.
        RuntimeError: inside torch.func.vmap; a backend that is not usable here, or, as BackendError, that failed.
    """
    if isinstance(bank, np.ndarray):
        bank = torch.as_tensor(as_tensor(bank))
    embeddings, packed = (bank, None) if isinstance(bank, Tensor) else check_bank(bank)
    if isinstance(query, np.ndarray) or (isinstance(query, Tensor) and query.dim() == 1):
        rows, is_single, is_array = as_rows(query, embeddings.device)
        found = nearest_safe(rows, bank, k, backend=backend, check=check)
        found = Neighbors(*(x[0] for x in found)) if is_single else found
        return Neighbors(*(as_array(x) for x in found)) if is_array else found
    if check:
        _check(query, embeddings, k, is_tensor=isinstance(bank, Tensor))
    if query.requires_grad:
        query = query.detach()
    if backend == "auto" and k > MAX_NATIVE_K:
        backend = "reference"
    work = query.shape[0] * embeddings.shape[0]
    return Neighbors(*run("nearest_safe", backend, query, work, query, embeddings, k, packed))


def check_bank(bank: Bank) -> tuple[Tensor, Tensor | None]:
    """`bank.text` and `bank.packed`.

    Raises TypeError for what has none, ValueError where the rows were written to after they were packed.
    """
    try:
        text, packed = bank.text, bank.packed
    except AttributeError as error:
        raise TypeError(f"bank must be a SafeBank, got {type(bank).__name__}: SafeBank(text, image)") from error
    if packed is not None and not torch.compiler.is_compiling():
        then = getattr(bank, "packed_version", None)
        if then is not None and version(text) != then:
            raise ValueError("bank.text was changed after pack(), and the search would read both: make a new SafeBank")
    return text, packed


def version(tensor: Tensor) -> int:
    """How often `tensor` was written to in place; 0 where torch does not count."""
    return 0 if tensor.is_inference() else tensor._version


def _check(query: Tensor, embeddings: Tensor, k: int, is_tensor: bool) -> None:
    check_count("k", k)
    check_matrix("query", query)
    if not torch.compiler.is_compiling() and torch._C._functorch.is_batchedtensor(query):
        raise RuntimeError("nearest_safe does not go through torch.func.vmap: give all rows at once, [rows, d]")
    check_matrix("bank", embeddings, like=("query", query))
    if embeddings.shape[0] == 0:
        raise ValueError("bank is empty: it needs at least one safe row")
    if not 1 <= k <= embeddings.shape[0]:
        raise ValueError(f"k={k} must lie between 1 and the bank's {embeddings.shape[0]} rows")
    check_finite("query", query)
    if is_tensor:  # a SafeBank was checked and normalized when it was made
        check_finite("bank", embeddings)
        check_unit_rows("bank", embeddings)


def neighbor_weights(neighbors: Neighbors, tau: float) -> Tensor:
    """How much each neighbor counts in a row's target: w_ij = softmax_j(s_ij / tau).

    Args:
        neighbors: k neighbors of each of Q rows.
        tau: temperature, above 0.

    Returns:
        [Q, k] float32, rows sum to 1.
    """
    if neighbors.scores.shape[1] == 1:
        return torch.ones_like(neighbors.scores)
    return torch.softmax(neighbors.scores / tau, dim=1)
