"""One process of `make gpu-check`: facts of the machine, first contact with every kernel, or the times of one op.

Each case is one JSON line, on disk as soon as it is known; a line that is there is not measured again. So a dead CUDA
context, a deadline or a kill costs the case at hand.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import saferclip_fast as sf
from benchmarks.gpu.cases import Case, machine_rates, measure, preservation_cases, retarget_cases, search_cases
from saferclip_fast.ops import reference
from saferclip_fast.ops.choice import select

OPS = ("retarget_loss", "nearest_safe", "preservation_loss")
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


def usable(op: str, device: str, dtype: torch.dtype) -> Iterator[tuple[str, object]]:
    """(backend, op) of every backend that runs `op` here."""
    for backend in ("cpu", "cuda", "triton", "reference"):
        try:
            yield backend, select(op, backend, device, dtype)
        except (ValueError, RuntimeError):
            continue


def unit(rows: int, dim: int, dtype: torch.dtype, device: str) -> Tensor:
    return F.normalize(torch.randn(rows, dim), dim=-1).to(device, dtype)


def smoke_cases(dtype: torch.dtype, device: str) -> Iterator[tuple[str, tuple]]:
    rows = [torch.randn(300, 96).to(device, dtype) for _ in range(4)]
    yield "nearest_safe", (rows[0], unit(3000, 96, dtype, device), 5)
    yield "preservation_loss", (*rows, [1.0] * 4, 100.0, True)
    bank = [unit(500, 96, torch.float32, device) for _ in range(2)]
    found = torch.randint(500, (300, 2), device=device), torch.full((300, 2), 0.5, device=device)
    shares, options = torch.full((300, 4), 1 / 300, device=device), ([1.0] * 4, 2.0, 0.1, True, True)
    yield "retarget_loss", (*rows, *bank, *found, shares, *options)


def worst_row(op: str, found: tuple, arguments: tuple) -> float:
    wide = [a.double() if isinstance(a, Tensor) and a.is_floating_point() else a for a in arguments]
    truth = getattr(reference, op)(*wide)
    if op == "nearest_safe":
        return float((found[0].double() - truth[0]).abs().max())
    errors = [(f.double() - t).norm(dim=1) / t.norm(dim=1) for f, t in zip(found[2:], truth[2:], strict=True)]
    return float(torch.cat(errors).max())


def smoke(lines: Lines, device: str) -> int:
    """Each op on each backend in each dtype, small, against float64; how many are wrong."""
    wrong = 0
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        torch.manual_seed(0)
        for op, arguments in smoke_cases(dtype, device):
            for backend, kernel in usable(op, device, dtype):
                key = {"stage": "smoke", "op": op, "way": backend, "dtype": str(dtype)}
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
            yield from search_cases(device, *size)
        return
    cases = retarget_cases if op == "retarget_loss" else preservation_cases
    for batch in (8,) if small else (48, 256, 1024, 4096, 16_384, 65_536):
        for dtype in DTYPES:
            yield from cases(device, batch, 32 if small else 768, dtype)


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
