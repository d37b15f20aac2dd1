"""NumPy arrays at the public boundary: read as tensors, and answered in kind."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor


def as_tensor(value: Any, device: torch.device | None = None) -> Any:
    """A NumPy array as a tensor, on `device`; anything else as it is. Memory is shared where that is safe."""
    if not isinstance(value, np.ndarray):
        return value
    own = np.require(value, value.dtype.newbyteorder("="), ["C", "W"])  # the same, where torch can take it as it is
    return torch.from_numpy(own).to(device)


def as_rows(query: Any, device: torch.device | None) -> tuple[Any, bool, bool]:
    """`query` as a tensor of rows; whether it was a single one [d], and whether it was a NumPy array."""
    is_array = isinstance(query, np.ndarray)
    rows = as_tensor(query, device)
    is_single = isinstance(rows, Tensor) and rows.dim() == 1
    return rows[None] if is_single else rows, is_single, is_array


def as_array(value: Tensor) -> Any:
    """A result as a NumPy array."""
    return value.cpu().numpy()
