"""Which backends are built and usable here. `choice` says which of them an op call takes."""

from __future__ import annotations

import functools
import importlib.util
import os
from typing import NamedTuple

import torch

from . import triton
from .register import _C, NATIVE_MISSING
from .schemas import SCHEMAS

BACKENDS = ("reference", "cpu", "cuda", "triton")
MAX_NATIVE_K = 256  # kMaxNeighbors of csrc/kernels/limits.h; the Triton kernels keep to it too
NATIVE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NO_KERNEL = {"cuda": ("info_nce_sums", "info_nce_loss", "neighbor_hinge")}  # another backend takes these
PICKED: dict[str, list[str]] = {}  # backend -> what it was picked for and why; `choice` writes it


class Backend(NamedTuple):
    """One row of `backends()`."""

    usable: bool
    ops: tuple[str, ...]
    detail: str
    picked: tuple[str, ...] = ()  # the calls that it was picked for so far in this process, and why


def _has_kernel(op: str, key: str) -> bool:
    return _C is not None and torch._C._dispatch_has_kernel_for_dispatch_key(f"saferclip_fast::{op}", key)


def _native_backend(key: str) -> Backend:
    ops = tuple(op for op in SCHEMAS if _has_kernel(op, key))
    if _C is None:
        return Backend(False, (), NATIVE_MISSING)
    if not ops:
        return Backend(False, (), f"the native module was built without {key} kernels")
    if key == "CUDA":
        return _cuda_backend(ops)
    return Backend(True, ops, f"built with {_C.compiler}")


def _triton_backend() -> Backend:
    if importlib.util.find_spec("triton") is None:
        return Backend(False, (), "the triton package is not installed; pip install triton")
    if torch.cuda.is_available():
        return Backend(True, tuple(triton.OPS), f"compiled at first use for {torch.cuda.get_device_name()}")
    if os.environ.get("TRITON_INTERPRET") == "1":
        return Backend(True, tuple(triton.OPS), "interpreted on the CPU (TRITON_INTERPRET=1): for tests, not for speed")
    return Backend(False, tuple(triton.OPS), "torch sees no GPU here (torch.cuda.is_available() is False)")


def _cuda_backend(ops: tuple[str, ...]) -> Backend:
    built = f"built for {_C.cuda_architectures}, CUDA runtime {_C.cuda_version} linked in"
    if not torch.cuda.is_available():
        return Backend(False, ops, f"{built}, but torch sees no CUDA device (torch.cuda.is_available() is False)")
    if torch.cuda.get_device_capability() < (8, 0):
        return Backend(False, ops, f"{built}, but {torch.cuda.get_device_name()} is older than compute capability 8.0")
    return Backend(True, ops, built)


@functools.cache
def built() -> dict[str, Backend]:
    """The rows of `backends()`, without what was picked."""
    return {
        "reference": Backend(True, tuple(SCHEMAS), f"plain PyTorch {torch.__version__}, any device and dtype"),
        "cpu": _native_backend("CPU"),
        "cuda": _native_backend("CUDA"),
        "triton": _triton_backend(),
    }


def backends() -> dict[str, Backend]:
    """The backends: what is built and usable here, why the rest is not, and what each was picked for.

    Returns:
        A dict from backend name ("reference", "cpu", "cuda", "triton") to `Backend(usable, ops, detail, picked)`.
    """
    return {name: row._replace(picked=tuple(PICKED.get(name, ()))) for name, row in built().items()}
