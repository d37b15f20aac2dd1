"""The cases that `make gpu-check` times: every op on every backend, in PyTorch and under torch.compile."""

from __future__ import annotations

import functools
import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

import saferclip_fast as sf
from benchmarks.gpu import rivals
from saferclip_fast.ops import HingeOutput, neighbor_hinge

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
    compiled = torch.compile(plain_search)
    ways: dict[str, Callable[[], object]] = {
        name: functools.partial(sf.nearest_safe, query, packed, k, backend=name, check=False)
        for name in backends("nearest_safe")
    }
    ways["PyTorch"] = lambda: plain_search(query, bank, k)
    ways["torch.compile"] = lambda: compiled(query, bank, k)
    for way, run in (ways | rivals.search(query, bank, k)).items():
        yield Case("nearest_safe", size, way, run, **cost)


def with_gradients(loss: Callable[..., Tensor], *trained: Tensor) -> Callable[[], object]:
    return lambda: torch.autograd.grad(loss(*trained), trained)


def loss_inputs(device: str, batch: int, dim: int, dtype: torch.dtype) -> list[Tensor]:
    tensors = [torch.randn(batch, dim, device=device).to(dtype) for _ in range(4)]
    for tensor in tensors[:2]:
        tensor.requires_grad_()
    return tensors


def size_of(text: Tensor, more: str = "") -> str:
    return f"B={len(text):,} d={text.shape[1]}{more} {str(text.dtype).removeprefix('torch.')}"


def retarget_cases(device: str, batch: int, rows: int, dim: int, dtype: torch.dtype, k: int = 16) -> Iterator[Case]:
    """k = 16 is what training takes by default."""
    text, image, frozen_text, frozen_image = loss_inputs(device, batch, dim, dtype)
    bank = sf.SafeBank(unit(rows, dim, device), unit(rows, dim, device))
    neighbors = sf.nearest_safe(frozen_text, bank, k, check=False)

    def plain(text: Tensor, image: Tensor) -> Tensor:
        u, v = F.normalize(text.float(), dim=-1), F.normalize(image.float(), dim=-1)
        r, s = F.normalize(frozen_text.float(), dim=-1), F.normalize(frozen_image.float(), dim=-1)
        share = torch.softmax(neighbors.scores / 0.05, dim=1).unsqueeze(1)
        near, far = ((share @ side[neighbors.indices]).squeeze(1) for side in (bank.text, bank.image))
        uni = 2 - (u * near).sum(-1) - (v * far).sum(-1)
        return (uni + F.softplus((u * (s - far)).sum(-1)) + F.softplus((v * (r - near)).sum(-1))).mean()

    def fused(backend: str, text: Tensor, image: Tensor) -> Tensor:
        options = dict(neighbors=neighbors, backend=backend, check=False)
        return sf.retarget_loss(text, image, frozen_text, frozen_image, bank, **options).loss

    moved = float(batch * dim * (6 * text.element_size() + 8 * k))
    ours = [(name, functools.partial(fused, name)) for name in backends("retarget_loss")]
    for way, loss in (*ours, ("PyTorch", plain), ("torch.compile", torch.compile(plain))):
        yield Case("retarget_loss", size_of(text, f" k={k}"), way, with_gradients(loss, text, image), bytes=moved)


def hinge_cases(device: str, batch: int, rows: int, dim: int, dtype: torch.dtype, k: int = 16) -> Iterator[Case]:
    text = loss_inputs(device, batch, dim, dtype)[0]
    limits = torch.rand(rows, 1, device=device)
    bank = torch.cat([unit(rows, dim, device), -limits, torch.zeros_like(limits)], dim=1) / 2**0.5
    indices = torch.randint(rows, (batch, k), device=device)
    found = sf.Neighbors(torch.randn(batch, k, device=device), indices)  # half of the hinges are open
    shares = torch.full((batch,), 1 / batch, device=device)

    def plain(text: Tensor) -> Tensor:
        extended = torch.cat([F.normalize(text.float(), dim=-1), text.new_ones(batch, 1).float()], dim=1)
        hinges = 2**0.5 * (bank[indices][..., :-1] @ extended.unsqueeze(2)).squeeze(2)
        return (shares * (hinges * (found.scores > 0)).sum(1)).sum() / k

    def fused(backend: str, text: Tensor) -> Tensor:
        result: HingeOutput = neighbor_hinge(text, bank, found, shares, k=k, backend=backend)
        return result.loss

    moved = float(batch * dim * (2 * text.element_size() + 4 * k / 2))
    ours = [(name, functools.partial(fused, name)) for name in backends("neighbor_hinge")]
    for way, loss in (*ours, ("PyTorch", plain), ("torch.compile", torch.compile(plain))):
        yield Case("neighbor_hinge", size_of(text, f" k={k}"), way, with_gradients(loss, text), bytes=moved)


def plain_contrast(u: Tensor, v: Tensor) -> Tensor:
    """Symmetric InfoNCE of unit rows; S is stored, in the rows' dtype."""
    labels = torch.arange(len(u), device=u.device)
    logits = rivals.SCALE * u @ v.T
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2


def contrast_cases(device: str, batch: int, dim: int, dtype: torch.dtype) -> Iterator[Case]:
    x, _, y, _ = loss_inputs(device, batch, dim, dtype)

    def of_units(loss: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        return lambda x: loss(F.normalize(x, dim=-1), F.normalize(y, dim=-1))

    def fused(backend: str, x: Tensor) -> Tensor:
        return sf.info_nce(x, y, backend=backend, check=False)

    ways = {name: functools.partial(fused, name) for name in backends("info_nce_sums")}
    ways |= {"PyTorch": of_units(plain_contrast), "torch.compile": torch.compile(of_units(plain_contrast))}
    ways |= {way: of_units(loss) for way, loss in rivals.contrast(device, batch).items()}
    operations = 2.0 * 2 * batch * batch * dim  # S and its gradient
    for way, loss in ways.items():
        yield Case("info_nce", size_of(x), way, with_gradients(loss, x), operations=operations)


def preservation_cases(device: str, batch: int, dim: int, dtype: torch.dtype) -> Iterator[Case]:
    text, image, frozen_text, frozen_image = loss_inputs(device, batch, dim, dtype)

    def of_units(contrast: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
        def loss(text: Tensor, image: Tensor) -> Tensor:
            u, v, r, s = (F.normalize(x, dim=-1) for x in (text, image, frozen_text, frozen_image))
            return 2 - (u * r).sum(-1).mean() - (v * s).sum(-1).mean() + contrast(u, s) + contrast(v, r)

        return loss

    def fused(backend: str, text: Tensor, image: Tensor) -> Tensor:
        return sf.preservation_loss(text, image, frozen_text, frozen_image, backend=backend, check=False).loss

    ways = {name: functools.partial(fused, name) for name in backends("preservation_loss")}
    ways |= {"PyTorch": of_units(plain_contrast), "torch.compile": torch.compile(of_units(plain_contrast))}
    ways |= {way: of_units(contrast) for way, contrast in rivals.contrast(device, batch).items()}
    operations = 2.0 * 4 * batch * batch * dim  # S and its gradient, for both terms
    for way, loss in ways.items():
        yield Case("preservation_loss", size_of(text), way, with_gradients(loss, text, image), operations=operations)
