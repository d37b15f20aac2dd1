"""Train for minutes and watch the memory: python -m tests.system.soak --minutes 120 [--json FILE]

A real run (training, validation, checkpoints, log, native ops) in this process. Its resident memory is read four times
a second; after a warm-up the line through the medians of twenty equal windows must not climb by more than BOUND_MIB
over the time measured, whatever that is: the longer the run, the smaller the leak that it finds.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import statistics
import sys
import tempfile
import threading
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from saferclip_fast.config import load_config
from saferclip_fast.train import train

WARM_UP = 0.25  # of the time: caches fill, the allocator reaches its working size
WINDOWS = 20
BOUND_MIB = 12.0  # runs of 1 to 5 minutes: -9 to +1; a tensor of 200 kB kept in each of 157 steps: +26
INTERVAL = 0.25  # seconds between readings


@dataclass(frozen=True)
class Soak:
    """How the memory of a run went."""

    minutes: float  # watched: time in which the process was stopped does not count
    steps: int
    first_mib: float  # median of the first window after the warm-up
    last_mib: float
    climb_mib: float  # of the fitted line, from the end of the warm-up to the end
    bound_mib: float
    machine: str

    @property
    def constant(self) -> bool:
        return self.climb_mib <= self.bound_mib


def climb(readings: Sequence[float]) -> float:
    """By how much the line through the medians of WINDOWS equal parts of `readings` rises from first to last."""
    size = len(readings) / WINDOWS
    medians = [statistics.median(readings[int(i * size) : int((i + 1) * size)]) for i in range(WINDOWS)]
    return statistics.linear_regression(range(WINDOWS), medians).slope * (WINDOWS - 1)


def soak(minutes: float, folder: Path, *overrides: str) -> Soak:
    """Trains a tiny model for `minutes` from its first logged step on, time in which the process is stopped left out.

    A SIGTERM to this process ends the run.
    """
    words = f"""
        run_dir={folder / "run"} data.cache_dir={folder / "cache"} device=cpu threads=1 model.name=ViT-tiny-8-32
        model.pretrained= data.train=scenes:n=96,size=32 data.val_fraction=0.2 data.num_workers=0
        lora.rank=4 train.epochs=1000000 train.batch_size=16 train.precision=fp32 train.ema=0.99
        checkpoint.every_steps=50 log.every_steps=5 log.tensorboard=true log.progress=false
    """.split()
    config = load_config(None, [*words, *overrides])
    readings: list[float] = []
    over = threading.Event()

    def watch() -> None:
        process, log = psutil.Process(), folder / "run" / "log.jsonl"
        while not (log.exists() and log.stat().st_size) and not over.wait(INTERVAL):
            pass
        while len(readings) * INTERVAL < 60 * minutes and not over.wait(INTERVAL):
            readings.append(process.memory_info().rss / 2**20)
        if not over.is_set():
            os.kill(os.getpid(), signal.SIGTERM)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # random weights will do
            result = train(config)
    finally:
        over.set()
        watcher.join()
    steady = readings[int(WARM_UP * len(readings)) :]
    window = max(1, len(steady) // WINDOWS)
    return Soak(
        minutes=round(len(readings) * INTERVAL / 60, 2),
        steps=result.progress.step,
        first_mib=round(statistics.median(steady[:window]), 1),
        last_mib=round(statistics.median(steady[-window:]), 1),
        climb_mib=round(climb(steady), 2),
        bound_mib=BOUND_MIB,
        machine=f"{platform.machine()}, {os.cpu_count()} cores",
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=120)
    parser.add_argument("--json", type=Path, help="where the result goes as well")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="options of the run, as in training")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = soak(given.minutes, Path(folder), *given.overrides)
    text = json.dumps(asdict(found), indent=2)
    print(text)
    if given.json:
        given.json.parent.mkdir(parents=True, exist_ok=True)
        given.json.write_text(text + "\n")
    print("memory: constant" if found.constant else f"memory climbs: more than {BOUND_MIB} MiB")
    return 0 if found.constant else 1


if __name__ == "__main__":
    sys.exit(main())
