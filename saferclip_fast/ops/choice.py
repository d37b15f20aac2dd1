"""Which backend an op call takes: the one the caller names, the one that is forced, or the table's.

The table is a list of rows, first match wins:
    {"op", "device", "name", "dtype", "below", "order", "because"}
`device` is a torch device type, `name` the chip (null: any), `dtype` "float32", "bfloat16", "float16" (null: any),
`below` the log2 of the work (null: any) and `order` the backends from best to worst. The work is the number of inner
products: Q N for nearest_safe, B k for retarget_loss and neighbor_hinge, B^2 for preservation_loss, M B for
info_nce_sums, whose rows count for info_nce_loss too. The user's own rows, measured on this machine by
`python -m saferclip_fast.tune`, stand before the package's.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import os
import platform
from collections.abc import Iterator
from pathlib import Path

import torch

from .backends import BACKENDS, NATIVE_DTYPES, NO_KERNEL, PICKED, built
from .forks import watch

log = logging.getLogger("saferclip_fast")
SHIPPED_TABLE = Path(__file__).with_name("backend_table.json")
LARGEST = 64  # the work of a traced call, whose sizes may be symbols
LEADER = {"info_nce_loss": "info_nce_sums"}  # runs where that one ran, whose logits it reads


class BackendError(RuntimeError):
    """A backend failed to compile, launch or run an op; the message names it."""


# Process-wide, not per thread: autograd's and a loader's threads must not choose differently. Plain globals, which
# torch.compile guards on.
_forced = os.environ.get("SAFERCLIP_FAST_BACKEND", "auto")
_fallback = os.environ.get("SAFERCLIP_FAST_FALLBACK", "0") == "1"
_KERNELS: dict[tuple, torch._ops.OpOverload] = {}
_NAMES: dict[tuple, str] = {}
_FAILED: set[tuple[str, str]] = set()  # (op, backend) that fell back


@contextlib.contextmanager
def use_backend(backend: str, *, fallback: bool = False) -> Iterator[None]:
    """Forces `backend` for every op called with backend="auto" inside, in the whole process.

    `fallback=True` also lets an op that fails on its backend be run by the next one, with a warning. The environment
    variables SAFERCLIP_FAST_BACKEND and SAFERCLIP_FAST_FALLBACK=1, read at import, do the same for a whole run. What a
    backend cannot take at all (float64, k > 256) still goes to the reference.

    Args:
        backend: "auto", "reference", "cpu", "cuda" or "triton".
        fallback: see above.

    Raises:
        ValueError: an unknown name.
    """
    global _forced, _fallback
    if backend != "auto" and backend not in BACKENDS:
        raise ValueError(f"backend={backend!r} is unknown; use 'auto' or one of {', '.join(BACKENDS)}")
    before = _forced, _fallback
    _forced, _fallback = backend, fallback
    _forget()
    try:
        yield
    finally:
        _forced, _fallback = before
        _forget()


def _forget() -> None:
    _KERNELS.clear()
    _FAILED.clear()


def table_path() -> Path:
    """The user's table: $SAFERCLIP_FAST_CACHE, else $XDG_CACHE_HOME/saferclip_fast, else ~/.cache/saferclip_fast."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("SAFERCLIP_FAST_CACHE") or Path(cache) / "saferclip_fast") / "backend_table.json"


def chip_name(device: str) -> str:
    """The chip that a measurement holds for: the GPU's name, or the CPU's architecture and instruction set."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    return f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"


@functools.cache
def table() -> list[dict]:
    """The user's rows, then the package's. A user's table that cannot be read is reported and left out."""
    rows = json.loads(SHIPPED_TABLE.read_text(encoding="utf-8"))
    try:
        rows = json.loads(table_path().read_text(encoding="utf-8")) + rows
    except FileNotFoundError:
        pass
    except (OSError, ValueError, TypeError) as error:
        log.warning("backend table %s is not usable (%s); run python -m saferclip_fast.tune", table_path(), error)
    return rows


def select(op: str, backend: str, device: str, dtype: torch.dtype, work: int = 0) -> torch._ops.OpOverload:
    """The torch op that runs `op` on `backend` ("auto" chooses) for tensors of this device type and dtype.

    Raises:
        ValueError: an unknown backend, or one that does not serve this device or dtype.
        RuntimeError: a backend that is not usable here; the message says why.
    """
    name = _name(op, _pick(op, backend, _forced, device, dtype, work.bit_length()))
    return getattr(torch.ops.saferclip_fast, name).default


def _traced_name(op: str, backend: str, forced: str, device: str, dtype: torch.dtype) -> str:
    return _name(op, _pick(op, backend, forced, device, dtype, LARGEST))


# The choice is made while tracing, not traced: what torch.compiler.assume_constant_result sets, without importing
# torch._dynamo, which takes longer than the rest of this package.
_traced_name._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _name(op: str, backend: str) -> str:
    return op if backend in ("cpu", "cuda") else f"{op}_{backend}"


def run(op: str, backend: str, like: torch.Tensor, work: int, *arguments):
    """Calls `op` on the backend chosen for tensors like `like`; see `BackendError` and `use_backend` for failures."""
    if torch.compiler.is_compiling():
        name = _traced_name(op, backend, _forced, like.device.type, like.dtype)
        return getattr(torch.ops.saferclip_fast, name).default(*arguments)
    key = (op, backend, like.device, like.dtype, work.bit_length())
    kernel = _KERNELS.get(key)
    if kernel is None:
        watch(_KERNELS.clear)
        kernel = _KERNELS[key] = select(op, backend, like.device.type, like.dtype, work)
    for number, argument in enumerate(arguments):  # a kernel would read the memory of another device as its own
        if isinstance(argument, torch.Tensor) and argument.device != like.device:
            name = kernel._schema.arguments[number].name
            raise ValueError(f"{op}: {name} is on {argument.device}, the rows on {like.device}; move one with .to()")
    try:
        return kernel(*arguments)
    except (ValueError, TypeError, torch.OutOfMemoryError):  # about the arguments, not the backend
        raise
    except Exception as error:
        if type(error).__module__ == "torch.utils.checkpoint":  # how recomputing ends as soon as it has what it needs
            raise
        failed = _backend_of(op, kernel)
        message = (
            f"backend {failed!r} failed to run {op} on {like.device} {like.dtype}: {type(error).__name__}: {error}"
        )
        if not _fallback or backend != "auto" or failed == "reference":
            raise BackendError(
                f"{message}\nName another with backend=... or SAFERCLIP_FAST_BACKEND; to let the next one take over,"
                " set SAFERCLIP_FAST_FALLBACK=1 or use saferclip_fast.use_backend('auto', fallback=True)"
            ) from error
        log.warning("%s; falling back, as allowed", message)
        _FAILED.add((LEADER.get(op, op), failed))
        _KERNELS.clear()
    return run(op, backend, like, work, *arguments)


def _backend_of(op: str, kernel: torch._ops.OpOverload) -> str:
    name = kernel._schema.name.split("::")[1]
    if name != op:
        return name.removeprefix(f"{op}_")
    return next(backend for backend in ("cuda", "cpu") if built()[backend].usable)


def _pick(op: str, backend: str, forced: str, device: str, dtype: torch.dtype, size: int) -> str:
    because = "named by the caller"
    if op in NO_KERNEL.get(backend, ()):
        backend = "auto"
    if backend == "auto":
        backend, because = _automatic(op, forced, device, dtype, size)
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r} is unknown; use 'auto' or one of {', '.join(BACKENDS)}")
    reason = _unfit(op, backend, device, dtype)
    if reason is not None:
        raise reason
    line = f"{op} on {device} {str(dtype).removeprefix('torch.')}, work < 2^{size}: {because}"
    if line not in PICKED.setdefault(backend, []):
        PICKED[backend].append(line)
    log.debug("%s -> %s", line, backend)
    return backend


def _automatic(op: str, forced: str, device: str, dtype: torch.dtype, size: int) -> tuple[str, str]:
    if dtype not in NATIVE_DTYPES:
        return "reference", "only the reference takes this dtype"
    leader = LEADER.get(op, op)
    unserved = op in NO_KERNEL.get(forced, ())
    if forced != "auto" and not unserved and (leader, forced) not in _FAILED:
        return forced, "forced"
    passed_over = []
    for row in table():
        if not _matches(row, leader, device, dtype, size):
            continue
        for name in row["order"]:
            if (leader, name) in _FAILED:
                passed_over.append(f"{name} failed")
            elif _unfit(op, name, device, dtype) is not None:
                passed_over.append(f"{name} is not usable here")
            else:
                return name, "; ".join([row["because"], *passed_over])
    return "reference", "; ".join(["no other backend is usable here", *passed_over])


def _matches(row: dict, op: str, device: str, dtype: torch.dtype, size: int) -> bool:
    return (
        row["op"] == op
        and row["device"] == device
        and row["dtype"] in (None, str(dtype).removeprefix("torch."))
        and (row["below"] is None or size <= row["below"])
        and (row["name"] is None or row["name"] == chip_name(device))
    )


def _unfit(op: str, backend: str, device: str, dtype: torch.dtype) -> Exception | None:
    """Why `backend` cannot take the call, or None."""
    if backend != "reference" and dtype not in NATIVE_DTYPES:
        return ValueError(f"backend={backend!r} takes float32, bfloat16 or float16, got {dtype}; use 'reference'")
    row = built()[backend]
    if op not in row.ops or not row.usable:
        return RuntimeError(f"backend={backend!r} cannot run {op} here: {row.detail}")
    wanted = {"cpu": "cpu", "cuda": "cuda", "triton": "cpu" if _interpreted() else "cuda"}.get(backend, device)
    if device != wanted:
        return ValueError(f"backend={backend!r} needs {wanted} tensors, got {device}; move them or use 'auto'")
    return None


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1" and not torch.cuda.is_available()
