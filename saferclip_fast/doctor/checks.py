"""Every op on every backend that is usable here, against the reference in float64."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..bank import SafeBank
from ..ops import Neighbors, backends, info_nce, nearest_safe, neighbor_hinge, preservation_loss, retarget_loss

QUERIES, ROWS, WIDTH, K = 128, 4000, 256, 8
TOLERANCE = 1e-4  # of values and gradients, relative: float32 keeps within 1e-6 or so, a wrong kernel is far off
ROUNDS = 3


class Check(NamedTuple):
    """One op on one backend."""

    op: str
    backend: str
    device: str
    error: float  # of the row farthest off, relative to float64; infinite for another neighbor or a failed call
    milliseconds: float
    problem: str = ""

    @property
    def passed(self) -> bool:
        """Whether it computes what the reference does."""
        return self.error <= TOLERANCE


class Inputs(NamedTuple):
    """The same numbers in every dtype: four inputs [QUERIES, WIDTH], of which two are trained, and a bank."""

    text: Tensor
    image: Tensor
    frozen_text: Tensor
    frozen_image: Tensor
    bank: SafeBank


def _search(x: Inputs, backend: str) -> tuple[Tensor, ...]:
    return tuple(nearest_safe(x.frozen_text, x.bank, K, backend=backend))


def _retarget(x: Inputs, backend: str) -> tuple[Tensor, ...]:
    return _with_gradients(retarget_loss(*x[:4], x.bank, K, backend=backend).loss, x)


def _preserve(x: Inputs, backend: str) -> tuple[Tensor, ...]:
    return _with_gradients(preservation_loss(*x[:4], backend=backend).loss, x)


def _info_nce(x: Inputs, backend: str) -> tuple[Tensor, ...]:
    return _with_gradients(info_nce(x.text, x.image, backend=backend), x)


def _hinge(x: Inputs, backend: str) -> tuple[Tensor, ...]:
    rows = F.pad(x.bank.text, (0, 2))  # of limit 0
    device = x.text.device
    found = Neighbors(torch.ones(QUERIES, K, device=device), torch.arange(QUERIES * K, device=device).view(-1, K))
    loss = neighbor_hinge(x.text, rows, found, torch.ones(QUERIES, device=device), k=K, backend=backend).loss
    return (loss.detach(), *torch.autograd.grad(loss, [x.text]))


def _with_gradients(loss: Tensor, x: Inputs) -> tuple[Tensor, ...]:
    return (loss.detach(), *torch.autograd.grad(loss, [x.text, x.image]))


OPS: dict[str, tuple[str, Callable[[Inputs, str], tuple[Tensor, ...]]]] = {  # op -> the torch op behind it, and a call
    "nearest_safe": ("nearest_safe", _search),
    "retarget_loss": ("retarget_loss", _retarget),
    "preservation_loss": ("preservation_loss", _preserve),
    "info_nce": ("info_nce_sums", _info_nce),
    "neighbor_hinge": ("neighbor_hinge", _hinge),
}


def self_check() -> Iterator[Check]:
    """Runs each op on each usable backend of each device; a second or two on two cores."""
    for name, row in backends().items():
        if name == "triton" and os.environ.get("TRITON_INTERPRET") == "1":
            continue  # an interpreter, for tests: minutes
        for device in _devices(name):
            for op, (behind, _) in OPS.items():
                if row.usable and behind in row.ops:
                    yield _check(op, name, device)


def _devices(backend: str) -> list[str]:
    gpu = ["cuda"] if torch.cuda.is_available() else []
    return {"cpu": ["cpu"], "cuda": gpu, "triton": gpu}.get(backend, ["cpu", *gpu])


def _check(op: str, backend: str, device: str) -> Check:
    inputs, call, times = _inputs(torch.float32, device), OPS[op][1], []
    try:
        for _ in range(ROUNDS):
            start = time.perf_counter()
            found = call(inputs, backend)
            if device == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
    except Exception as failure:  # a kernel may raise anything; the doctor says which
        problem = f"{type(failure).__name__}: {(str(failure).splitlines() or [''])[0]}"
        return Check(op, backend, device, float("inf"), 0.0, problem)
    wanted = call(_inputs(torch.float64, "cpu"), "reference")
    error = max(_distance(a.cpu(), b) for a, b in zip(found, wanted, strict=True))
    return Check(op, backend, device, error, 1e3 * sorted(times)[len(times) // 2])


def _inputs(dtype: torch.dtype, device: str) -> Inputs:
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randn(count, WIDTH, generator=generator) for count in (*[QUERIES] * 4, ROWS, ROWS)]
    a, b, c, d, text, image = (x.to(device, dtype) for x in rows)
    return Inputs(a.requires_grad_(), b.requires_grad_(), c, d, SafeBank(text, image).pack())


@torch.no_grad()
def _distance(found: Tensor, wanted: Tensor) -> float:
    """Of the row that is farthest off, each by its own length."""
    if not wanted.is_floating_point():
        return 0.0 if torch.equal(found, wanted) else float("inf")
    found, wanted = (x.double().reshape(len(x) if x.dim() else 1, -1) for x in (found, wanted))
    distance = float(((found - wanted).norm(dim=1) / wanted.norm(dim=1)).max())
    return distance if distance == distance else float("inf")  # NaN is far off
