"""One process of `make gpu-check`: facts of the machine, first contact with every kernel, or the times of one op.

Each case is one JSON line, on disk as soon as it is known; a line that is there is not measured again. So a dead CUDA
context, a deadline or a kill costs the case at hand.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import saferclip_fast as sf
from benchmarks.gpu import cases
from benchmarks.gpu.cases import Case, machine_rates, measure
from saferclip_fast.ops import reference
from saferclip_fast.ops.backends import NO_KERNEL
from saferclip_fast.ops.choice import select

OPS = ("retarget_loss", "neighbor_hinge", "nearest_safe", "info_nce", "preservation_loss")
DTYPES = (torch.bfloat16, torch.float32)  # what training feeds to the losses: under autocast, and without
CORRECT = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 2e-2}  # the worst row, by its own size


class Lines:
    """A file of JSON lines that is only ever added to."""

    def __init__(self, path: Path) -> None:
        self.path = path
        text = path.read_text() if path.exists() else ""
        whole = text[: text.rfind("\n") + 1]  # a kill may have cut the last line
        if whole != text:
            path.write_text(whole)
        self.rows = [json.loads(line) for line in whole.splitlines()]

    def has(self, **key: object) -> bool:
        return any(key.items() <= row.items() for row in self.rows)

    def add(self, **row: object) -> None:
        self.rows.append(row)
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")
            file.flush()
            os.fsync(file.fileno())
        print(*row.values(), flush=True)


def usable(op: str, device: str, dtype: torch.dtype) -> Iterator[tuple[str, Callable]]:
    """(backend, op) of every backend that has a kernel of `op` for this device."""
    for backend in ("cpu", "cuda", "triton", "reference"):
        if {op, f"{op}_sums"} & set(NO_KERNEL.get(backend, ())):
            continue  # it would be another's
        pick = functools.partial(select, backend=backend, device=device, dtype=dtype)
        try:
            yield backend, implementation(op, pick)
        except (ValueError, RuntimeError):
            continue


def unit(rows: int, dim: int, dtype: torch.dtype, device: str) -> Tensor:
    return F.normalize(torch.randn(rows, dim), dim=-1).to(device, dtype)


def smoke_cases(dtype: torch.dtype, device: str) -> Iterator[tuple[str, tuple]]:
    batch, count = (300, 3000) if device == "cuda" else (24, 100)  # interpreted, a kernel takes seconds
    rows = [torch.randn(batch, 96).to(device, dtype) for _ in range(4)]
    yield "nearest_safe", (rows[0], unit(count, 96, dtype, device), 5)
    yield "preservation_loss", (*rows, [1.0] * 4, 100.0, True)
    mask = torch.arange(batch, device=device) % 3 > 0
    first, last = batch // 8, batch // 2
    for x, start, chosen in (
        (rows[0], 0, None),
        (rows[0][first:last], first, None),
        (rows[0][first:last], first, mask),
    ):
        yield "info_nce", (x, rows[1], chosen, start, 100.0)  # all rows; a process's rows; some of them
    bank = [unit(count, 96, torch.float32, device) for _ in range(2)]
    found = torch.randint(count, (batch, 2), device=device), torch.full((batch, 2), 0.5, device=device)
    shares, options = torch.full((batch, 4), 1 / batch, device=device), ([1.0] * 4, 2.0, 0.1, True, True)
    yield "retarget_loss", (*rows, *bank, *found, shares, *options)
    limited, scores = torch.randn(count, 98).to(device), torch.randn(batch, 2).to(device)
    yield "neighbor_hinge", (rows[0], limited, found[0], scores, shares[:, 0].contiguous(), 0.1, 2, True)


def info_nce(sums: Callable, loss: Callable, *arguments: object) -> tuple[Tensor, Tensor]:
    """Both halves of the op, as one process runs them: S kept for the gradient."""
    x, y, mask, first, scale = arguments
    rows, columns, logits = sums(x, y, mask, first, scale, True)
    columns = torch.stack([columns[0], columns[1].log()])
    return loss(x, y, mask, rows, columns, logits, first, scale, True)


def implementation(op: str, get: Callable[[str], Callable]) -> Callable:
    """The op, or for info_nce its two halves, by what `get` gives for a torch op's name."""
    if op != "info_nce":
        return get(op)
    return functools.partial(info_nce, get("info_nce_sums"), get("info_nce_loss"))


def worst_row(op: str, found: tuple, arguments: tuple) -> float:
    wide = [a.double() if isinstance(a, Tensor) and a.is_floating_point() else a for a in arguments]
    truth = implementation(op, functools.partial(getattr, reference))(*wide)
    if op == "nearest_safe":
        return float((found[0].double() - truth[0]).abs().max())
    gradients = [(f.double(), t) for f, t in zip(found, truth, strict=True) if t.dim() == 2]
    errors = [(f - t).norm(dim=1) / t.norm(dim=1).clamp(min=torch.finfo(f.dtype).tiny) for f, t in gradients]
    return float(torch.cat(errors).max())


def smoke(lines: Lines, device: str) -> int:
    """Each op on each backend in each dtype, small, against float64; how many are wrong."""
    wrong = 0
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        torch.manual_seed(0)
        for number, (op, arguments) in enumerate(smoke_cases(dtype, device)):
            for backend, kernel in usable(op, device, dtype):
                key = {"stage": "smoke", "op": op, "case": number, "way": backend, "dtype": str(dtype)}
                if lines.has(**key, ok=True):
                    continue
                start = time.perf_counter()
                try:
                    error, problem = worst_row(op, kernel(*arguments), arguments), ""
                except Exception as failure:  # whatever it is, the next backend is still worth a try
                    error, problem = float("inf"), f"{type(failure).__name__}: {failure}"[:300]
                ok = error < CORRECT[dtype]
                wrong += not ok
                seconds = time.perf_counter() - start
                lines.add(**key, ok=ok, worst=str(error), first_call_seconds=seconds, problem=problem)
    return wrong


def timed_cases(op: str, device: str, small: bool) -> Iterator[Case]:
    """Smallest first."""
    if op == "nearest_safe":
        grid = [(16_384, 100_000, 128, k) for k in (1, 8, 16, 32)]
        sizes = [(48, 100_000, 768, 1), (4096, 100_000, 768, 1), (4096, 100_000, 768, 16), *grid]
        sizes = [(8, 300, 32, 2)] if small else [*sizes, (4096, 1_000_000, 768, 1)]
        for size in sizes:
            yield from cases.search_cases(device, *size)
        return
    makers = {
        "retarget_loss": cases.retarget_cases,
        "neighbor_hinge": cases.hinge_cases,
        "info_nce": cases.contrast_cases,
        "preservation_loss": cases.preservation_cases,
    }
    bank = [40 if small else 100_000] if op in ("retarget_loss", "neighbor_hinge") else []
    for batch in (8,) if small else (48, 256, 1024, 4096, 16_384, 65_536):
        for dtype in DTYPES:
            yield from makers[op](device, batch, *bank, 32 if small else 768, dtype)


def times(lines: Lines, op: str, device: str, seconds: float, small: bool = False) -> int:
    """0, or 3 where the time ended first: a second call goes on."""
    end = time.monotonic() + seconds
    rates = machine_rates(device, 1 << 12, 16) if small else machine_rates(device)
    for case in timed_cases(op, device, small):
        key = {"stage": "times", "op": op, "size": case.size, "way": case.way}
        if lines.has(**key):
            continue
        if time.monotonic() > end:
            print(f"no time for {case.size} {case.way}")
            return 3
        start = time.perf_counter()
        result = measure(case, device, rates, 2 if small else 20)
        found = {name: value for name, value in vars(result).items() if name not in key}
        lines.add(**key, **found, seconds=time.perf_counter() - start)
    return 0


def facts(lines: Lines) -> int:
    found = {"python": sys.version.split()[0], "torch": torch.__version__, "cuda": torch.version.cuda, "gpu": None}
    if torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability()
        found |= {"gpu": torch.cuda.get_device_name(), "capability": f"{major}{minor}"}
    backends = {name: status.usable for name, status in sf.backends().items()}
    lines.add(stage="facts", **found, backends=backends)
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("facts", "smoke", *OPS))
    parser.add_argument("lines", type=Path)
    parser.add_argument("--seconds", type=float, default=60)
    options = parser.parse_args()
    device, lines = "cuda" if torch.cuda.is_available() else "cpu", Lines(options.lines)
    if options.what == "facts":
        return facts(lines)
    if options.what == "smoke":
        return smoke(lines, device)
    return times(lines, options.what, device, options.seconds)


if __name__ == "__main__":
    sys.exit(main())
