"""The cases that `make gpu-check` times: every op on every backend, in PyTorch and under torch.compile."""

from __future__ import annotations

import functools
import importlib.util
import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

import saferclip_fast as sf

QUANTILES = (0.5, 0.1, 0.9)


@dataclass
class Case:
    """One way to do one op; `bytes` and `operations` are what the op needs at least."""

    op: str
    size: str
    way: str
    run: Callable[[], object]
    bytes: float = 0.0
    operations: float = 0.0


@dataclass
class Result:
    op: str
    size: str
    way: str
    milliseconds: float
    low: float
    high: float
    peak_megabytes: float
    of_copy_bandwidth: float
    of_matrix_rate: float
    error: str = ""


def durations(run: Callable[[], object], device: str, repeats: int) -> Tensor:
    """Milliseconds of each repeat, by CUDA events on a GPU."""
    for _ in range(3):
        run()
    if device != "cuda":
        marks = [time.perf_counter()]
        for _ in range(repeats):
            run()
            marks.append(time.perf_counter())
        return torch.tensor(marks, dtype=torch.float64).diff() * 1e3
    events = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    torch.cuda.synchronize()
    events[0].record()
    for event in events[1:]:
        run()
        event.record()
    torch.cuda.synchronize()
    return torch.tensor([a.elapsed_time(b) for a, b in itertools.pairwise(events)], dtype=torch.float64)


def machine_rates(device: str, elements: int = 1 << 28, side: int = 8192) -> tuple[float, float]:
    """Measured bytes/s of a copy and operations/s of a bf16 matrix product: the yardsticks."""
    source = torch.empty(elements, dtype=torch.bfloat16, device=device)
    target = torch.empty_like(source)
    copy = durations(lambda: target.copy_(source), device, 10).median()
    a = torch.randn(side, side, dtype=torch.bfloat16, device=device)
    product = durations(lambda: a @ a, device, 10).median()
    return float(2 * source.nbytes / copy * 1e3), float(2 * side**3 / product * 1e3)


def measure(case: Case, device: str, rates: tuple[float, float], repeats: int) -> Result:
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated() if device == "cuda" else 0
    try:
        times = durations(case.run, device, repeats)
    except (RuntimeError, ImportError) as error:  # out of memory, or a rival that does not take these inputs
        return Result(case.op, case.size, case.way, 0, 0, 0, 0, 0, 0, str(error).splitlines()[0][:200])
    median, low, high = (float(times.quantile(q)) for q in QUANTILES)
    peak = (torch.cuda.max_memory_allocated() - held) / 1e6 if device == "cuda" else 0.0
    seconds = median / 1e3
    return Result(
        *(case.op, case.size, case.way, median, low, high, peak),
        of_copy_bandwidth=case.bytes / seconds / rates[0],
        of_matrix_rate=case.operations / seconds / rates[1],
    )


def unit(rows: int, dim: int, device: str, dtype=torch.float32) -> Tensor:
    return F.normalize(torch.randn(rows, dim, device=device), dim=-1).to(dtype)


def plain_search(query: Tensor, bank: Tensor, k: int, chunk: int = 4096):
    parts = [(F.normalize(q, dim=-1) @ bank.T).topk(k) for q in query.split(chunk)]
    return torch.cat([p.values for p in parts]), torch.cat([p.indices for p in parts])


def backends(op: str) -> list[str]:
    return [name for name, status in sf.backends().items() if status.usable and op in status.ops]


def search_cases(device: str, batch: int, rows: int, dim: int, k: int) -> Iterator[Case]:
    query, bank = torch.randn(batch, dim, device=device), unit(rows, dim, device)
    packed = sf.SafeBank(bank, bank).pack()
    size = f"B={batch:,} N={rows:,} d={dim} k={k}"
    cost = dict(bytes=4.0 * dim * (batch + rows), operations=2.0 * batch * rows * dim)
    for name in backends("nearest_safe"):
        run = functools.partial(sf.nearest_safe, query, packed, k, backend=name, check=False)
        yield Case("nearest_safe", size, name, run, **cost)
    yield Case("nearest_safe", size, "PyTorch", lambda: plain_search(query, bank, k), **cost)
    compiled = torch.compile(plain_search)
    yield Case("nearest_safe", size, "torch.compile", lambda: compiled(query, bank, k), **cost)
    if importlib.util.find_spec("faiss"):
        import faiss
        import faiss.contrib.torch_utils  # lets faiss take CUDA tensors

        if hasattr(faiss, "StandardGpuResources"):
            index = faiss.GpuIndexFlatIP(faiss.StandardGpuResources(), dim)
            index.add(bank)
            yield Case("nearest_safe", size, "faiss-gpu", lambda: index.search(F.normalize(query, dim=-1), k), **cost)


def with_gradients(loss: Callable[..., Tensor], *trained: Tensor) -> Callable[[], object]:
    return lambda: torch.autograd.grad(loss(*trained), trained)


def loss_inputs(device: str, batch: int, dim: int, dtype: torch.dtype) -> list[Tensor]:
    tensors = [torch.randn(batch, dim, device=device).to(dtype) for _ in range(4)]
    for tensor in tensors[:2]:
        tensor.requires_grad_()
    return tensors


def retarget_cases(device: str, batch: int, rows: int, dim: int, dtype=torch.bfloat16) -> Iterator[Case]:
    text, image, frozen_text, frozen_image = loss_inputs(device, batch, dim, dtype)
    bank = sf.SafeBank(unit(rows, dim, device), unit(rows, dim, device))
    neighbors = sf.nearest_safe(frozen_text, bank, 1, check=False)

    def plain(text: Tensor, image: Tensor) -> Tensor:
        u, v = F.normalize(text.float(), dim=-1), F.normalize(image.float(), dim=-1)
        r, s = F.normalize(frozen_text.float(), dim=-1), F.normalize(frozen_image.float(), dim=-1)
        near, far = bank.text[neighbors.indices[:, 0]], bank.image[neighbors.indices[:, 0]]
        uni = 2 - (u * near).sum(-1) - (v * far).sum(-1)
        return (uni + F.softplus((u * (s - far)).sum(-1)) + F.softplus((v * (r - near)).sum(-1))).mean()

    def fused(backend: str, text: Tensor, image: Tensor) -> Tensor:
        options = dict(neighbors=neighbors, backend=backend, check=False)
        return sf.retarget_loss(text, image, frozen_text, frozen_image, bank, **options).loss

    size, moved = (
        f"B={batch:,} d={dim} k=1 {str(dtype).removeprefix('torch.')}",
        float(batch * dim * (6 * text.element_size() + 8)),
    )
    ours = [(name, functools.partial(fused, name)) for name in backends("retarget_loss")]
    for way, loss in (*ours, ("PyTorch", plain), ("torch.compile", torch.compile(plain))):
        yield Case("retarget_loss", size, way, with_gradients(loss, text, image), bytes=moved)


def preservation_cases(device: str, batch: int, dim: int, dtype=torch.bfloat16) -> Iterator[Case]:
    text, image, frozen_text, frozen_image = loss_inputs(device, batch, dim, dtype)
    labels = torch.arange(batch, device=device)

    def plain(text: Tensor, image: Tensor) -> Tensor:
        u, v, r, s = (F.normalize(x, dim=-1) for x in (text, image, frozen_text, frozen_image))
        loss = 2 - (u * r).sum(-1).mean() - (v * s).sum(-1).mean()
        for logits in (100.0 * u @ s.T, 100.0 * v @ r.T):
            loss = loss + (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2
        return loss

    def fused(backend: str, text: Tensor, image: Tensor) -> Tensor:
        return sf.preservation_loss(text, image, frozen_text, frozen_image, backend=backend, check=False).loss

    ways = {name: functools.partial(fused, name) for name in backends("preservation_loss")}
    ways |= {"PyTorch": plain, "torch.compile": torch.compile(plain)}
    if importlib.util.find_spec("inf_cl"):
        from inf_cl import cal_inf_loss

        def rival(text: Tensor, image: Tensor) -> Tensor:
            scale = torch.tensor(100.0, device=device)
            u, v, r, s = (F.normalize(x, dim=-1) for x in (text, image, frozen_text, frozen_image))
            return cal_inf_loss(u, s, scale=scale).mean() + cal_inf_loss(v, r, scale=scale).mean()

        ways["Inf-CL"] = rival
    for way, loss in ways.items():
        operations = 2.0 * 4 * batch * batch * dim  # S and its gradient, for both terms
        yield Case(
            *("preservation_loss", f"B={batch:,} d={dim} {str(dtype).removeprefix('torch.')}", way),
            with_gradients(loss, text, image),
            operations=operations,
        )
