"""Parts that the benchmarks share: interleaved timing, memory, machine facts, result files that resume (README.md)."""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path

import torch

import saferclip_fast as sf
from saferclip_fast.storage.files import save_json

PYTORCH = ("eager", "compiled", "chunked")  # how the names of paths begin that do the whole op in PyTorch
ROOT = Path(__file__).resolve().parents[1]
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
Paths = Mapping[str, Callable[[], object]]
LEAST_ROUNDS = 3  # of fewer calls there is no median
Clock = Callable[[Callable[[], object]], float]  # runs a path once: seconds


def seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def medians(
    paths: Paths, rounds: int = 7, budget_s: float = 20.0, clock: Clock = seconds
) -> tuple[dict[str, float], int]:
    """Median seconds of each path, warm, and of how many rounds; one call of each per round, so that a disturbance hits
    all of them. A budget that is spent ends them after LEAST_ROUNDS.

    When to stop is decided by what `clock` says alone: where several processes measure, they decide alike.
    """
    times: dict[str, list[float]] = {name: [] for name in paths}
    done, spent = 0, 0.0
    while done < rounds or (spent < 0.2 and done < 200):
        for name, path in paths.items():
            times[name].append(clock(path))
            spent += times[name][-1]
        done += 1
        if spent > budget_s and done >= LEAST_ROUNDS:
            break
    return {name: statistics.median(values) for name, values in times.items()}, done


def extra_memory(call: Callable[[], object]) -> float | None:
    """MiB by which the resident size rises at most during one call, its result included; None where not on Linux."""
    if not Path("/proc/self/clear_refs").exists():
        return None
    ctypes.CDLL(None).malloc_trim(0)  # what earlier calls freed is given back, or this one would seem to need less
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = _resident("VmRSS")
    call()
    return (_resident("VmHWM") - before) / 2**10


def _resident(field: str) -> int:
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status[field].split()[0])


def measure(
    paths: Paths, rounds: int, budget_s: float, memory: bool = True, clock: Clock = seconds
) -> dict[str, object]:
    """`NAME_ms` and `NAME_MiB` of each path, and what the best PyTorch path takes over ours: `torch/NAME`."""
    for path in paths.values():
        path()
    extra = {f"{name}_MiB": extra_memory(path) for name, path in paths.items()} if memory else {}
    times, done = medians(paths, rounds, budget_s, clock)
    found: dict[str, object] = {f"{name}_ms": seconds * 1e3 for name, seconds in times.items()} | extra
    found["rounds"] = done
    in_torch = {name: seconds for name, seconds in times.items() if name.startswith(PYTORCH)}
    if in_torch:
        best = min(in_torch, key=lambda name: in_torch[name])
        found |= {"best_torch": best, "best_torch_ms": times[best] * 1e3, "best_torch_MiB": extra.get(f"{best}_MiB")}
        found |= {f"torch/{name}": times[best] / times[name] for name in times if name.startswith("ours")}
    return found


def machine() -> dict[str, object]:
    """Facts of the machine that decide the figures; no names, no paths."""
    cpu = next(
        (line.split(":")[1].strip() for line in _cpu_info() if line.startswith("model name")), platform.machine()
    )
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    native = sf.backends()["cpu"]
    facts = {"cpu": cpu, "cores": CORES, "isa": isa() if native.usable else None, "gpu": gpu}
    return {**facts, "native": native.detail, "python": platform.python_version(), **_versions()}


def isa() -> str:
    """The instruction set that our kernels use."""
    from saferclip_fast import _C

    return os.environ.get("SAFERCLIP_FAST_ISA") or _C.cpu_isas()[0]


def isas() -> list[str]:
    """The instruction sets of this CPU that the kernels have a copy for, best first; the portable copy is left out."""
    from saferclip_fast import _C

    return [name for name in _C.cpu_isas() if name != "generic"]


@contextlib.contextmanager
def forced(name: str) -> Iterator[None]:
    """Within it, our kernels use this instruction set; the choice is read at every call."""
    before = os.environ.get("SAFERCLIP_FAST_ISA")
    os.environ["SAFERCLIP_FAST_ISA"] = name
    try:
        yield
    finally:
        if before is None:
            del os.environ["SAFERCLIP_FAST_ISA"]
        else:
            os.environ["SAFERCLIP_FAST_ISA"] = before


def _versions() -> dict[str, str]:
    installed = {found.metadata["Name"]: found.version for found in metadata.distributions()}
    wanted = ("torch", "triton", "faiss-cpu", "faiss-gpu", "numkong", "transformers")
    return {name: installed[name] for name in wanted if name in installed}


def _cpu_info() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []


def revision() -> str | None:
    """The commit that is measured, with a + where the code differs from it."""
    sources = ["saferclip_fast", "csrc", "benchmarks", ":(exclude)benchmarks/results"]
    try:
        head = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, check=True)
        changed = subprocess.run(["git", "diff", "--quiet", "HEAD", "--", *sources], cwd=ROOT, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return head.stdout.decode().strip() + ("+" if changed.returncode else "")


def put_aside(path: Path) -> None:
    """Renames NAME.json to NAME.json.old, if it is there."""
    if path.exists():
        path.replace(path.with_suffix(".json.old"))
        print(f"  the old results are in {path.name}.old")


class Results:
    """The rows of one benchmark, in a JSON file as well: what is in it is not measured again.

    A file of another machine or other software is put aside as NAME.json.old, and everything is measured.
    """

    def __init__(self, title: str, path: str | None, **notes: object) -> None:
        self.title, self.path, self.machine = title, Path(path) if path else None, {**machine(), **notes}
        self.rows: list[dict] = []
        self.about = {"revision": revision(), "date": datetime.now(timezone.utc).date().isoformat()}
        self.last = time.perf_counter()
        if self.machine["isa"] is None:
            raise SystemExit(f"nothing to measure: {sf.backends()['cpu'].detail}; make setup builds it")
        print(title, flush=True)
        if self.path is not None and self.path.exists():
            old = json.loads(self.path.read_text())
            if (old.get("title"), old.get("machine")) == (title, self.machine):
                self.rows = old["rows"]
            else:
                print(f"  {self.path.name} is of another machine or other software: measuring anew")
                put_aside(self.path)

    def has(self, case: Mapping[str, object]) -> bool:
        wanted = {**case, "threads": torch.get_num_threads()}
        return any(wanted.items() <= row.items() for row in self.rows)

    def add(self, case: Mapping[str, object], found: Mapping[str, object]) -> None:
        now = time.perf_counter()
        self.rows.append(
            {**case, "threads": torch.get_num_threads(), **found, **self.about, "seconds": round(now - self.last, 1)}
        )
        self.last = now
        shown = {**case, **{name: value for name, value in found.items() if name.endswith("_ms") or "/" in name}}
        print_row(shown)
        if self.path is not None:
            save_json(self.path, {"title": self.title, "machine": self.machine, "rows": self.rows})


def print_row(row: Mapping[str, object]) -> None:
    print("  " + "  ".join(f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in row.items()), flush=True)


def parser(doc: str | None, rounds: int, budget_s: float) -> argparse.ArgumentParser:
    """The options that every benchmark has."""
    found = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--rounds", type=int, default=rounds, help="calls of each path (default: %(default)s)")
    found.add_argument(
        "--budget", type=float, default=budget_s, help="seconds a case, after which no round begins (%(default)s)"
    )
    found.add_argument("--json", help="file of the results; what it holds is not measured again")
    return found


def varied(base: Mapping[str, object], values: Mapping[str, Iterable[object]]) -> list[dict[str, object]]:
    """`base`, and `base` with one of its entries changed to each of the values: the points of scaling curves."""
    cases = [dict(base)]
    for name, others in values.items():
        cases += [{**base, name: value} for value in others if value != base[name]]
    return cases


def run(
    title: str,
    cases: Iterable[Mapping[str, object]],
    paths: Callable[..., Paths],
    args: argparse.Namespace,
) -> None:
    """Measures `paths(**case)` for every case that the result file lacks."""
    results = Results(title, args.json)
    for case in cases:
        if not results.has(case):
            torch.manual_seed(0)
            torch._dynamo.reset()  # compiles each case for its own shapes, short of the recompilation limit
            results.add(case, measure(paths(**case), args.rounds, args.budget))
