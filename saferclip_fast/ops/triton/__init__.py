"""The Triton backend: one file per op. Importing this package does not import Triton; the first call does."""

from __future__ import annotations

import importlib
from collections.abc import Callable

OPS = {  # op -> its module
    "nearest_safe": "nearest_safe",
    "retarget_loss": "retarget_loss",
    "preservation_loss": "preservation_loss",
    "info_nce_sums": "info_nce",
    "info_nce_loss": "info_nce",
    "neighbor_hinge": "neighbor_hinge",
}


def implementation(op: str) -> Callable:
    """The Python function behind torch.ops.saferclip_fast.<op>_triton."""

    def call(*args):
        return getattr(importlib.import_module(f"{__name__}.{OPS[op]}"), op)(*args)

    return call
