"""Registers the torch ops of every backend, once: importing this module is what does it."""

from __future__ import annotations

import torch
from torch import Tensor

from . import reference, triton
from .schemas import SCHEMAS, register_backend, register_shapes_and_autograd

try:
    from .. import _C  # importing it registers torch.ops.saferclip_fast.<op> for the devices it was built for
except ImportError as error:
    _C = None  # type: ignore[assignment]
    NATIVE_MISSING = f"the native module is not built ({error}); reinstall with a C++ compiler on PATH"
else:
    NATIVE_MISSING = ""

for _op in SCHEMAS:
    register_backend(_op, "reference", getattr(reference, _op))
    if _op in triton.OPS:
        register_backend(_op, "triton", triton.implementation(_op))
    if _C is not None:
        register_shapes_and_autograd(_op, _op)
if _C is not None:
    # The blob's size is the kernel's own business, so a trace sees it as data-dependent.
    @torch.library.register_fake("saferclip_fast::pack_bank")
    def _fake_pack_bank(bank: Tensor) -> Tensor:
        size = torch.library.get_ctx().new_dynamic_size()
        return bank.new_empty(size, dtype=torch.uint8)
