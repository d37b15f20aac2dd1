"""Validation at the public boundary: every message names the argument and the remedy."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def check_matrix(name: str, value: Tensor, like: tuple[str, Tensor] | None = None, rows: bool = False) -> None:
    """`value` must be a floating [rows, d] tensor, of the device and width of `like` (and of its rows, if `rows`).

    Raises TypeError for no tensor, ValueError for the rest; the message says how to mend it.
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
    """Raises ValueError naming the first row of `value` that holds NaN or Inf."""
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
    """Raises ValueError unless each row of `value` has length 1 (or 0), to the precision of its dtype."""
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


def check_labels(name: str, labels: Tensor, rows: int, device: torch.device) -> Tensor:
    """`labels` as float32 [rows] of zeros and ones (1 = unsafe)."""
    if labels.shape != (rows,):
        raise ValueError(f"{name} must have shape [{rows}], one label a row, got {tuple(labels.shape)}")
    return labels.to(device=device, dtype=torch.float32)


def term_weights(names: tuple[str, ...], weights: Mapping[str, float] | None) -> list[float]:
    """`weights` in the order of `names`; a name left out weighs 1."""
    unknown = set(weights or {}) - set(names)
    if unknown:
        raise ValueError(f"weights has unknown terms {sorted(unknown)}; the terms are {', '.join(names)}")
    return [float((weights or {}).get(name, 1.0)) for name in names]
