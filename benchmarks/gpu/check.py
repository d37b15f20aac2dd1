"""Everything that needs a GPU, in one command and within a deadline: make gpu-check, or with no network OFFLINE=1.

Stages, each with a limit: the machine, packages from a folder of wheels, the module for this chip, first contact of
every kernel, tests, times (a process an op), four sanitizer tools, the backend table. What is known is on disk at once,
under $SAFERCLIP_GPU_RESULTS: state.json, lines.jsonl, logs.txt, summary.txt, backend_table.json. A second call goes on.
$SAFERCLIP_GPU_WHEELS names the folder of wheels. The stages that need a GPU are left out where there is none.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PART = "hard_searches or (retarget_loss and 64-1) or (preservation_loss and 1-64)"
OPS = ("retarget_loss", "neighbor_hinge", "nearest_safe", "info_nce", "preservation_loss")
PREDICTED = {(way, "preservation_loss") for way in ("cuda", "triton")} | {
    ("cuda", op) for op in ("nearest_safe", "retarget_loss")
}
WITHIN = 0.3  # a prediction holds if the time is at most this far from it


@dataclass
class Stage:
    name: str
    limit: float  # seconds
    command: list[str]
    environment: dict[str, str] = field(default_factory=dict)


class Run:
    """The results folder, what is done, and the time that is left."""

    def __init__(self, folder: Path, seconds: float) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.end = folder, time.monotonic() + seconds
        self.state_file = folder / "state.json"
        self.state: dict[str, dict] = json.loads(self.state_file.read_text()) if self.state_file.exists() else {}
        self.site = ROOT / "build" / "gpu-site"

    def left(self) -> float:
        return self.end - time.monotonic()

    def environment(self, stage: Stage) -> dict[str, str]:
        paths = [str(self.site), str(ROOT), os.environ.get("PYTHONPATH", "")]
        return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), **stage.environment}

    def do(self, *stages: Stage) -> bool:
        """Runs stages side by side, unless they are done; whether all of them succeeded."""
        with ThreadPoolExecutor(len(stages)) as pool:
            endings = list(pool.map(self._one, [s for s in stages if self.state.get(s.name, {}).get("code") != 0]))
        for stage, ending, log in endings:
            self.note(stage.name, ending, log)
        return all(self.state[s.name]["code"] == 0 for s in stages)

    def _one(self, stage: Stage) -> tuple[Stage, dict, str]:
        limit, start = min(stage.limit, self.left()), time.monotonic()
        if limit < 5:
            return stage, {"code": None, "why": "left out: no time"}, ""
        child = subprocess.Popen(
            stage.command, cwd=ROOT, env=self.environment(stage), stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True, errors="replace", start_new_session=True,
        )  # fmt: skip
        try:
            log, code = child.communicate(timeout=limit)[0], child.returncode
        except subprocess.TimeoutExpired:
            os.killpg(child.pid, signal.SIGKILL)
            log, code = child.communicate()[0], "stopped at its limit"
        return stage, {"code": code, "seconds": round(time.monotonic() - start, 1)}, log

    def note(self, name: str, ending: dict, log: str = "") -> None:
        """On disk before the next stage begins."""
        self.state[name] = ending
        part = self.state_file.with_suffix(".part")
        part.write_text(json.dumps(self.state, indent=1))
        part.replace(self.state_file)
        last = log.strip().splitlines()[-1][:200] if log.strip() else ending.get("why", "")
        line = f"{name}: {ending['code']} {ending.get('seconds', '')} s | {last}"
        print(line, flush=True)
        with (self.folder / "summary.txt").open("a") as file:
            file.write(line + "\n")
        with (self.folder / "logs.txt").open("a") as file:
            file.write(f"===== {name}\n{log[-200_000:]}\n")

    def lines(self, stage: str) -> list[dict]:
        path = self.folder / "lines.jsonl"
        rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        return [row for row in rows if row["stage"] == stage]


def measuring(run: Run, what: str, name: str, limit: float) -> Stage:
    command = [sys.executable, "-m", "benchmarks.gpu.measure", what, str(run.folder / "lines.jsonl")]
    seconds = min(limit, run.left()) - 8  # it ends by itself before it is stopped
    return Stage(name, limit, [*command, "--seconds", str(seconds)])


def pytest_stage(name: str, limit: float, *words: str) -> Stage:
    return Stage(name, limit, [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *words])


def on_a_gpu(run: Run, capability: str) -> None:
    """The stages that need the device: build, tests, times, sanitizers, table."""
    chip = {"90": "90a-real", "100": "100a-real"}.get(capability, f"{capability}-real")
    environment = {"SAFERCLIP_FAST_CUDA": "1", "SAFERCLIP_CUDA_ARCHITECTURES": chip}
    run.do(Stage("build", 180, [sys.executable, "setup.py", "build_ext", "--inplace"], environment))
    run.do(measuring(run, "smoke", "smoke", 90))
    cuda = "tests/backends/cuda"
    run.do(
        pytest_stage("tests of CUDA", 170, "-m", "gpu", f"{cuda}/test_gpu.py", f"{cuda}/test_launch.py"),
        pytest_stage("tests of Triton", 170, "tests/backends/triton", "--ignore=tests/backends/triton/test_compile.py"),
        pytest_stage("tests of training", 170, "-m", "gpu", f"{cuda}/test_gpu_training.py"),
    )
    for op in OPS:
        run.do(measuring(run, op, f"times of {op}", 70))
    if sanitizer := shutil.which("compute-sanitizer"):
        tests = pytest_stage("", 100, "-m", "gpu", f"{cuda}/test_gpu.py", "-k", PART).command
        # behind torch's caching allocator memcheck sees one big block and no bounds
        uncached = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        tools = ("memcheck", "racecheck", "initcheck", "synccheck")
        run.do(*(Stage(t, 100, [sanitizer, "--tool", t, "--error-exitcode", "9", *tests], uncached) for t in tools))
    table = ["-m", "saferclip_fast.tune", "--device", "cuda", "--output", str(run.folder / "backend_table.json")]
    run.do(Stage("backend table", 90, [sys.executable, *table]))


def held(rows: list[dict], gpu: str | None) -> list[str]:
    """Which of the roofline's predictions held, a line each."""
    from benchmarks.gpu import roofline

    chip = next((g for g in roofline.GPUS if gpu and g.name in gpu), None)
    if chip is None:
        return [f"no predictions for {gpu or 'a machine without a GPU'}"]
    found = []
    for row in rows:
        if (row["way"], row["op"]) not in PREDICTED or row["error"]:
            continue
        size = {k: int(v.replace(",", "")) for k, v in (word.split("=") for word in row["size"].split() if "=" in word)}
        if row["op"] == "nearest_safe":
            cost = roofline.search(chip, size["B"], size["N"], size["d"], size["k"])
        elif "float32" in row["size"]:
            continue  # no prediction
        elif row["op"] == "retarget_loss":
            cost = roofline.retarget(size["B"], size["d"], size["k"])
        elif row["way"] == "triton":
            cost = roofline.chunked_preservation(chip, size["B"], size["d"])
        else:
            cost = roofline.preservation(size["B"], size["d"])
        predicted, measured = cost.seconds(chip, real=True) * 1e3, row["milliseconds"]
        verdict = "held" if abs(measured / predicted - 1) <= WITHIN else "did not hold"
        found.append(
            f"{row['op']} {row['way']} {row['size']}: predicted {predicted:.3g} ms,"
            f" measured {measured:.3g} ms: {verdict}"
        )
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=585, help="the deadline (default: %(default)s)")
    options = parser.parse_args()
    run = Run(Path(os.environ.get("SAFERCLIP_GPU_RESULTS") or ROOT / "build" / "gpu-check"), options.seconds)
    if wheels := os.environ.get("SAFERCLIP_GPU_WHEELS"):
        files = sorted(map(str, Path(wheels).glob("*.whl")))
        pip = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--target", str(run.site)]
        run.do(Stage("wheels", 60, [*pip, *files]))
    run.do(measuring(run, "facts", "facts", 60))
    facts = run.lines("facts")
    gpu = facts[-1]["gpu"] if facts else None
    if gpu is None:
        run.do(measuring(run, "smoke", "smoke", 90))
        run.note("device", {"code": None, "why": "left out: torch sees no GPU"})
    else:
        on_a_gpu(run, facts[-1]["capability"])
    print(*held(run.lines("times"), gpu), sep="\n")
    return 0 if gpu and all(ending["code"] == 0 for ending in run.state.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
