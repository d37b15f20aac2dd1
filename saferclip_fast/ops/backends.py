"""Which backends are built and usable here, and which of them an op call takes."""

from __future__ import annotations

import functools
import importlib.util
from typing import NamedTuple

import torch
from torch import Tensor

from . import reference
from .schemas import SCHEMAS, register_backend, register_shapes_and_autograd

try:
    from .. import _C  # importing it registers torch.ops.saferclip_fast.<op> for the devices it was built for
except ImportError as error:
    _C = None  # type: ignore[assignment]
    _NATIVE_MISSING = f"the native module is not built ({error}); reinstall with a C++ compiler on PATH"

for _op in SCHEMAS:
    register_backend(_op, "reference", getattr(reference, _op))
    if _C is not None:
        register_shapes_and_autograd(_op, _op)
if _C is not None:
    # The blob's size is the kernel's own business, so a trace sees it as data-dependent.
    @torch.library.register_fake("saferclip_fast::pack_bank")
    def _fake_pack_bank(bank: Tensor) -> Tensor:
        size = torch.library.get_ctx().new_dynamic_size()
        return bank.new_empty(size, dtype=torch.uint8)


BACKENDS = ("reference", "cpu", "cuda", "triton")
MAX_NATIVE_K = 256
_NATIVE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Backend(NamedTuple):
    """One row of `backends()`."""

    usable: bool
    ops: tuple[str, ...]
    detail: str


def _has_kernel(op: str, key: str) -> bool:
    return _C is not None and torch._C._dispatch_has_kernel_for_dispatch_key(f"saferclip_fast::{op}", key)


def _native_backend(key: str) -> Backend:
    ops = tuple(op for op in SCHEMAS if _has_kernel(op, key))
    if _C is None:
        return Backend(False, (), _NATIVE_MISSING)
    if not ops:
        return Backend(False, (), f"the native module was built without {key} kernels")
    if key == "CUDA":
        return _cuda_backend(ops)
    return Backend(True, ops, f"built with {_C.compiler}")


def _cuda_backend(ops: tuple[str, ...]) -> Backend:
    built = f"built for {_C.cuda_architectures}, CUDA runtime {_C.cuda_version} linked in"
    if not torch.cuda.is_available():
        return Backend(False, ops, f"{built}, but torch sees no CUDA device (torch.cuda.is_available() is False)")
    if torch.cuda.get_device_capability() < (8, 0):
        return Backend(False, ops, f"{built}, but {torch.cuda.get_device_name()} is older than compute capability 8.0")
    return Backend(True, ops, built)


@functools.cache
def backends() -> dict[str, Backend]:
    """What is built and usable here, and why the rest is not.

    Returns a dict from backend name ("reference", "cpu", "cuda", "triton") to `Backend(usable, ops, detail)`.
    """
    return {
        "reference": Backend(True, tuple(SCHEMAS), f"plain PyTorch {torch.__version__}, any device and dtype"),
        "cpu": _native_backend("CPU"),
        "cuda": _native_backend("CUDA"),
        "triton": _triton_backend(),
    }


def _triton_backend() -> Backend:
    if importlib.util.find_spec("triton") is None:
        return Backend(False, (), "the triton package is not installed")
    return Backend(False, (), "no Triton kernels in this version")


def _automatic(op: str, device: str, dtype: torch.dtype) -> str:
    """float64 goes to the reference; otherwise the device's own kernels where they are built."""
    if dtype in _NATIVE_DTYPES and device in ("cpu", "cuda"):
        for name in (device, "triton") if device == "cuda" else (device,):
            found = backends()[name]
            if found.usable and op in found.ops:
                return name
    return "reference"


_SELECTED: dict[tuple, str] = {}  # a plain dict: torch.compile traces through functools.cache


def select(op: str, backend: str, device: str, dtype: torch.dtype) -> torch._ops.OpOverload:
    """The torch op that runs `op` on `backend` ("auto" chooses) for tensors of this device type and dtype.

    Raises:
        ValueError: an unknown backend, or one that does not serve this device or dtype.
        RuntimeError: a backend that is not usable here; the message says why.
    """
    return getattr(torch.ops.saferclip_fast, _selected_name(op, backend, device, dtype)).default


@torch.compiler.assume_constant_result  # the choice is made while tracing, not traced
def _selected_name(*key) -> str:
    if key not in _SELECTED:
        _SELECTED[key] = _select_name(*key)
    return _SELECTED[key]


def _select_name(op: str, backend: str, device: str, dtype: torch.dtype) -> str:
    if backend == "auto":
        backend = _automatic(op, device, dtype)
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r} is unknown; use 'auto' or one of {', '.join(BACKENDS)}")
    if backend != "reference" and dtype not in _NATIVE_DTYPES:
        raise ValueError(f"backend={backend!r} takes float32, bfloat16 or float16, got {dtype}; use 'reference'")
    found = backends()[backend]
    if op not in found.ops or not found.usable:
        raise RuntimeError(f"backend={backend!r} cannot run {op} here: {found.detail}")
    if backend in ("cpu", "cuda") and device != backend:
        raise ValueError(f"backend={backend!r} needs {backend} tensors, got {device}; move them or use 'auto'")
    return op if backend in ("cpu", "cuda") else f"{op}_{backend}"
