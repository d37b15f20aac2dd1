"""Validation at the public boundary: every message names the argument and the remedy."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def check_matrix(name: str, value: Tensor, like: tuple[str, Tensor] | None = None, rows: bool = False) -> None:
    """Refuses what is no floating [rows, d] tensor that fits another one; the message says how to mend it.

    Args:
        name: of the argument, for the message.
        value: what was given.
        like: name and tensor whose device and width `value` must have.
        rows: `value` must have as many rows as `like` too.

    Raises:
        TypeError: no tensor.
        ValueError: any other misfit.
    """
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
    if value.dim() != 2:
        raise ValueError(f"{name} must have shape [rows, d], got {tuple(value.shape)}")
    if value.dtype not in FLOATS:
        raise ValueError(f"{name} must be float64, float32, bfloat16 or float16, got {value.dtype}; use .float()")
    if like is None:
        return
    other_name, other = like
    if value.shape[1] != other.shape[1]:
        raise ValueError(
            f"{name} has d={value.shape[1]} but {other_name} has d={other.shape[1]}; both must come from one model"
        )
    if rows and value.shape[0] != other.shape[0]:
        raise ValueError(f"{name} has {value.shape[0]} rows but {other_name} has {other.shape[0]}")
    if value.device != other.device:
        raise ValueError(f"{name} is on {value.device} but {other_name} is on {other.device}; move one with .to()")


def check_finite(name: str, value: Tensor) -> None:
    """Refuses NaN and Inf.

    Raises:
        ValueError: names the first row of `value` that holds one.
    """
    if torch.compiler.is_compiling():  # a data-dependent raise would break the graph
        return
    if torch.isfinite(value.detach().sum(dtype=torch.float32)):  # one cheap pass; a sum can overflow, so ask again
        return
    bad = (~torch.isfinite(value.detach()).all(dim=-1)).nonzero()
    if len(bad):
        raise ValueError(
            f"{name} holds NaN or Inf, first in row {int(bad[0, 0])} ({len(bad)} of {value.shape[0]} rows);"
            " drop these rows or find the step that made them (check=False turns this check off)"
        )


def row_norms(value: Tensor) -> Tensor:
    """The length of each row, [rows], in float32 (float64 for float64)."""
    return torch.linalg.vector_norm(value, dim=-1, dtype=torch.promote_types(value.dtype, torch.float32))


def check_unit_rows(name: str, value: Tensor) -> None:
    """Refuses rows whose length is neither 1 nor 0, to the precision of their dtype.

    Raises:
        ValueError: names the first such row and its length.
    """
    if torch.compiler.is_compiling():
        return
    norms = row_norms(value.detach())
    tolerance = 1e-3 if value.dtype in (torch.float32, torch.float64) else 1e-2
    bad = (((norms - 1).abs() > tolerance) & (norms > 0)).nonzero()
    if len(bad):
        row = int(bad[0, 0])
        raise ValueError(
            f"{name} row {row} has length {float(norms[row]):.4g}, not 1, so a score would not be a cosine;"
            f" pass SafeBank(text, image) or torch.nn.functional.normalize({name}, dim=-1)"
        )


def check_labels(name: str, labels: Tensor, count: int, device: torch.device) -> Tensor:
    """`labels` as float32 [count] of zeros and ones (1 = unsafe).

    Raises:
        ValueError: labels of another shape.
    """
    if labels.shape != (count,):
        raise ValueError(f"{name} must have shape [{count}], one label a row, got {tuple(labels.shape)}")
    return labels.to(device=device, dtype=torch.float32)


def term_weights(names: tuple[str, ...], weights: Mapping[str, float] | None) -> list[float]:
    """`weights` in the order of `names`; a name left out weighs 1.

    Raises:
        ValueError: a weight of a term that does not exist.
    """
    unknown = set(weights or {}) - set(names)
    if unknown:
        raise ValueError(f"weights has unknown terms {sorted(unknown)}; the terms are {', '.join(names)}")
    return [float((weights or {}).get(name, 1.0)) for name in names]
