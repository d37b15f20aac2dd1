"""Everything that needs a GPU, in one go: `make gpu-check`, or python benchmarks/check.py [--json FILE]

Runs the GPU-marked tests, compute-sanitizer on a part of them (where it is installed), and times each op against eager
PyTorch, torch.compile and, where installed, faiss and Inf-CL. Writes one JSON file and prints a table: milliseconds
(median and 10th/90th percentile), peak memory, and the fraction of this machine's own copy bandwidth or matrix rate.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import saferclip_fast as sf

ROOT = Path(__file__).resolve().parents[2]
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


def search_cases(device: str, batch: int, rows: int, dim: int, k: int) -> Iterator[Case]:
    query, bank = torch.randn(batch, dim, device=device), unit(rows, dim, device)
    packed = sf.SafeBank(bank, bank).pack()
    size = f"B={batch:,} N={rows:,} d={dim} k={k}"
    cost = dict(bytes=4.0 * dim * (batch + rows), operations=2.0 * batch * rows * dim)
    yield Case("nearest_safe", size, "saferclip_fast", lambda: sf.nearest_safe(query, packed, k, check=False), **cost)
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

    def fused(text: Tensor, image: Tensor) -> Tensor:
        return sf.retarget_loss(text, image, frozen_text, frozen_image, bank, neighbors=neighbors, check=False).loss

    size, moved = f"B={batch:,} d={dim} k=1", float(batch * dim * (6 * text.element_size() + 8))
    for way, loss in (("saferclip_fast", fused), ("PyTorch", plain), ("torch.compile", torch.compile(plain))):
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

    def fused(text: Tensor, image: Tensor) -> Tensor:
        return sf.preservation_loss(text, image, frozen_text, frozen_image, check=False).loss

    ways = {"saferclip_fast": fused, "PyTorch": plain, "torch.compile": torch.compile(plain)}
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
            "preservation_loss", f"B={batch:,} d={dim}", way, with_gradients(loss, text, image), operations=operations
        )


def all_cases(device: str, small: bool) -> Iterator[Case]:
    if small:  # for the tests of this file
        yield from search_cases(device, 8, 300, 32, 2)
        yield from retarget_cases(device, 8, 50, 32)
        yield from preservation_cases(device, 8, 32)
        return
    for batch, rows, k in (
        (48, 100_000, 1),
        (4096, 100_000, 1),
        (4096, 100_000, 8),
        (4096, 1_000_000, 1),
        (65536, 100_000, 1),
    ):
        yield from search_cases(device, batch, rows, 768, k)
    for batch in (48, 4096, 65536):
        yield from retarget_cases(device, batch, 100_000, 768)
    for batch in (48, 4096, 16384, 65536):
        yield from preservation_cases(device, batch, 768)


def benchmark(device: str, repeats: int = 30, small: bool = False) -> dict:
    rates = machine_rates(device, 1 << 12, 16) if small else machine_rates(device)
    results = [measure(case, device, rates, repeats) for case in all_cases(device, small)]
    name = torch.cuda.get_device_name() if device == "cuda" else device
    return {
        "device": name,
        "torch": torch.__version__,
        "copy_bytes_per_second": rates[0],
        "matrix_operations_per_second": rates[1],
        "results": [asdict(r) for r in results],
    }


def table(report: dict) -> str:
    lines = [
        f"{report['device']}, torch {report['torch']}: copy {report['copy_bytes_per_second'] / 1e12:.2f} TB/s,"
        f" bf16 product {report['matrix_operations_per_second'] / 1e12:.0f} Tflop/s",
        "",
        "| op | size | way | ms (10 % / 90 %) | peak MB | of copy bandwidth | of matrix rate |",
        "|---|---|---|---|---|---|---|",
    ]
    for r in report["results"]:
        if r["error"]:
            lines.append(f"| {r['op']} | {r['size']} | {r['way']} | {r['error']} | | | |")
            continue
        times = f"{r['milliseconds']:.3f} ({r['low']:.3f} / {r['high']:.3f})"
        shares = f"{r['of_copy_bandwidth']:.0%} | {r['of_matrix_rate']:.0%}"
        lines.append(f"| {r['op']} | {r['size']} | {r['way']} | {times} | {r['peak_megabytes']:.0f} | {shares} |")
    return "\n".join(lines)


def checks() -> dict[str, int]:
    """Exit codes of the GPU tests and of compute-sanitizer's tools."""
    files = ["tests/backends/cuda/test_gpu.py", "tests/backends/cuda/test_gpu_training.py"]
    tests = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", *files]
    codes = {"tests": subprocess.run(tests, cwd=ROOT).returncode}
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        print("compute-sanitizer is not on PATH: its checks are left out")
        return codes
    part = "hard_searches or (retarget_loss and 64-1) or (preservation_loss and 1-64)"
    for tool in ("memcheck", "racecheck", "synccheck"):
        command = [sanitizer, "--tool", tool, "--error-exitcode", "9", *tests, "-k", part]
        codes[tool] = subprocess.run(command, cwd=ROOT).returncode
    return codes


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, default=ROOT / "benchmarks" / "results" / "gpu.json")
    parser.add_argument("--no-checks", action="store_true", help="benchmarks only")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print(f"gpu-check needs a CUDA GPU; {sf.backends()['cuda'].detail}", file=sys.stderr)
        return 1
    codes = {} if options.no_checks else checks()
    report = {"checks": codes, **benchmark("cuda")}
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(report, indent=2))
    print(table(report), f"\nwritten to {options.json}")
    return int(any(codes.values()))


if __name__ == "__main__":
    sys.exit(main())
