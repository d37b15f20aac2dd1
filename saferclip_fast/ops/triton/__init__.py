"""The Triton backend: one file per op. Importing this package does not import Triton; the first call does."""

from __future__ import annotations

import importlib
from collections.abc import Callable

OPS = ("nearest_safe", "retarget_loss", "preservation_loss", "neighbor_hinge")


def implementation(op: str) -> Callable:
    """The Python function behind torch.ops.saferclip_fast.<op>_triton."""

    def call(*args):
        return getattr(importlib.import_module(f"{__name__}.{op}"), op)(*args)

    return call
