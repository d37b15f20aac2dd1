"""Validation at the public boundary: every message names the argument and the remedy."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.autograd.forward_ad as forward_ad
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


def wide(dtype: torch.dtype) -> torch.dtype:
    """What is computed in for inputs of `dtype`: float32, or float64 for float64."""
    return torch.promote_types(dtype, torch.float32)


def near_one(value: Tensor) -> tuple[Tensor, Tensor]:
    """Rows [rows, d] over a power of two that brings their largest entry into [0.5, 1), and its exponent [rows, 1].

    In float32 (float64 for float64), where squares of rows below 1e-22 vanish and of those above 1e19 overflow.
    Nothing is rounded, and a row of zeros stays as it is.
    """
    value = value.to(wide(value.dtype))
    exponent = torch.frexp(value.abs().amax(-1, keepdim=True) if value.shape[-1] else value.sum(-1, keepdim=True))[1]
    return shifted(value, -exponent), exponent


def shifted(value: Tensor, exponent: Tensor) -> Tensor:
    """`value` times two to the `exponent`, in two parts, since the power itself may be out of range."""
    half = exponent // 2
    return torch.ldexp(torch.ldexp(value, half), exponent - half)


def row_norms(value: Tensor) -> Tensor:
    """The length of each row, [rows], in float32 (float64 for float64); Inf where that is out of range."""
    rows, exponent = near_one(value)
    return shifted(torch.linalg.vector_norm(rows, dim=-1), exponent.squeeze(-1))


def check_first_order(op: str, *inputs: Tensor) -> None:
    """Refuses transforms that a closed-form gradient of first order does not go through.

    Raises:
        RuntimeError: inside a transform of torch.func, or for an input that carries a forward-mode tangent.
    """
    if torch.compiler.is_compiling():
        return
    found = "a transform of torch.func (grad, jvp, vmap, ...)" if torch._C._are_functorch_transforms_active() else ""
    if forward_ad._current_level >= 0 and any(forward_ad.unpack_dual(x).tangent is not None for x in inputs):
        found = "forward-mode differentiation"
    if found:
        raise RuntimeError(f"{op} does not go through {found}: use loss.backward() or torch.autograd.grad")


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


def check_labels(name: str, labels: Tensor, count: int, device: torch.device, check: bool = False) -> Tensor:
    """`labels` as float32 [count] in [0, 1], how unsafe each row is.

    Args:
        check: look at the values, which waits for the device.

    Raises:
        TypeError: no tensor.
        ValueError: labels of another shape, NaN, or one outside [0, 1].
    """
    if not isinstance(labels, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(labels).__name__}")
    if labels.shape != (count,):
        raise ValueError(f"{name} must have shape [{count}], one label a row, got {tuple(labels.shape)}")
    if check and not torch.compiler.is_compiling():
        bad = (~((labels >= 0) & (labels <= 1))).nonzero()  # NaN is neither
        if len(bad):
            row = int(bad[0, 0])
            raise ValueError(
                f"{name} must lie between 0 (safe) and 1 (unsafe), but row {row} has {labels[row].item():g}"
            )
    return labels.to(device=device, dtype=torch.float32)


def check_count(name: str, value: int) -> None:
    """Refuses what is no whole number.

    Raises:
        TypeError: names the argument and what it is.
    """
    if isinstance(value, bool) or not isinstance(value, int | torch.SymInt):
        raise TypeError(f"{name} must be a whole number, got {type(value).__name__} {value!r:.40}")


def check_number(name: str, value: float) -> float:
    """`value` as a float.

    Raises:
        TypeError: no number, or a tensor that asks for a gradient, which it would not get.
        ValueError: NaN or infinite.
    """
    if torch.compiler.is_compiling():
        return value
    if isinstance(value, str) or (isinstance(value, Tensor) and (value.requires_grad or value.numel() != 1)):
        raise TypeError(f"{name} must be a number and gets no gradient, got {type(value).__name__}: pass float({name})")
    try:
        number = float(value)
    except (TypeError, ValueError) as error:
        raise TypeError(f"{name} must be a number, got {type(value).__name__}") from error
    if not math.isfinite(number):
        raise ValueError(f"{name}={number} must be a finite number")
    return number


def term_weights(names: tuple[str, ...], weights: Mapping[str, float] | None) -> list[float]:
    """`weights` in the order of `names`; a name left out weighs 1.

    Raises:
        ValueError: a weight of a term that does not exist, or that is NaN or infinite.
        TypeError: no mapping, or a weight that is no number.
    """
    if weights is not None and not isinstance(weights, Mapping):
        raise TypeError(f"weights must map terms to numbers, got {type(weights).__name__}")
    unknown = set(weights or {}) - set(names)
    if unknown:
        raise ValueError(f"weights has unknown terms {sorted(unknown)}; the terms are {', '.join(names)}")
    return [check_number(f"weights[{name!r}]", (weights or {}).get(name, 1.0)) for name in names]
