"""What the op benchmarks share: interleaved timing, tables, JSON."""

from __future__ import annotations

import json
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

import saferclip_fast as sf


def medians(paths: Mapping[str, Callable[[], object]], rounds: int = 7, budget_s: float = 20.0) -> dict[str, float]:
    """Median seconds of each path; one call of each per round, so that a disturbance hits all of them."""
    for path in paths.values():
        path()
    times: dict[str, list[float]] = {name: [] for name in paths}
    begin = time.perf_counter()
    while len(times[next(iter(paths))]) < rounds or (
        time.perf_counter() - begin < 0.2 and len(times[next(iter(paths))]) < 200
    ):
        for name, path in paths.items():
            start = time.perf_counter()
            path()
            times[name].append(time.perf_counter() - start)
        if time.perf_counter() - begin > budget_s:
            break
    return {name: statistics.median(values) for name, values in times.items()}


def extra_memory(call: Callable[[], object]) -> float:
    """Bytes by which the resident size rises at most during one call (Linux), its result included."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = _resident("VmRSS")
    call()
    return _resident("VmHWM") - before


def _resident(field: str) -> int:
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status[field].split()[0]) * 1024


def machine() -> dict[str, object]:
    cpu = next((line.split(":")[1].strip() for line in cpu_info() if line.startswith("model name")), platform.machine())
    detail = sf.backends()["cpu"].detail
    return {"cpu": cpu, "threads": torch.get_num_threads(), "torch": torch.__version__, "backend": detail}


def cpu_info() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []


def print_row(row: Mapping[str, object]) -> None:
    print("  " + "  ".join(f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in row.items()), flush=True)


def report(title: str, rows: list[dict[str, object]], path: str | None) -> None:
    """Prints one line a row and writes machine and rows as JSON."""
    print(title)
    for row in rows:
        print_row(row)
    if path is not None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(json.dumps({"title": title, "machine": machine(), "rows": rows}, indent=1) + "\n")
