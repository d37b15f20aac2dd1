"""Faults at random moments of a run of two ranks: `python -m tests.train.ranks.random_faults [RUNS] [SEED]`.

Each run is started as a user starts it, `torchrun --max-restarts`, and meets one fault; where it ended, the same
command is given again. Its final weights and log must be, bit for bit, those of a run that was left alone. The test
suite has one such run; this takes minutes.
"""

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

import psutil
import torch

from saferclip_fast.models import load_clip
from tests.support.tiny import tiny_words
from tests.train.conftest import final_weights, log_lines
from tests.train.ranks.launch import start, torchrun, workers

FAULTS = ("kill", "terminate", "pause", "machine", "cut", "flip")
PAUSE = 1.0  # seconds


def inject(fault: str, process: subprocess.Popen, rank: int, run_dir: Path, chance: random.Random) -> None:
    """One fault.

    kill, terminate, pause: SIGKILL to a rank; SIGTERM; SIGSTOP for a while
    machine: SIGKILL to all processes, as where the power fails
    cut, flip: SIGKILL to a rank, and the newest checkpoint loses its end, or has a wrong bit
    """
    alive = workers(process.pid)
    if rank >= len(alive):  # ended already: the fault comes too late, which is one of the moments
        return
    if fault == "machine":
        everyone = psutil.Process(process.pid).children(recursive=True)
        for one in (process, *everyone):
            one.kill()
    elif fault == "pause":
        os.kill(alive[rank], signal.SIGSTOP)
        time.sleep(PAUSE)
        os.kill(alive[rank], signal.SIGCONT)
    else:
        os.kill(alive[rank], signal.SIGTERM if fault == "terminate" else signal.SIGKILL)
    if fault in ("cut", "flip"):
        saved = sorted((run_dir / "checkpoints").glob("step-*"), key=lambda path: path.stat().st_mtime)
        for path in saved[-1:]:
            damage(path, fault, chance)


def damage(path: Path, fault: str, chance: random.Random) -> None:
    content = bytearray(path.read_bytes())
    place = chance.randrange(len(content))
    if fault == "flip":
        content[place] ^= 1 << chance.randrange(8)
    path.write_bytes(content[:place] if fault == "cut" else content)


def main(runs: int, seed: int) -> None:
    chance = random.Random(seed)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(7)
        weights = load_clip("ViT-tiny-8-32").export(Path(folder, "weights"))
        undisturbed = Path(folder, "undisturbed")
        tiny = lambda run_dir: ["saferclip_fast.train", "--resume", "auto", *tiny_words(run_dir, weights, folder)]  # noqa: E731
        done = torchrun(2, *tiny(undisturbed))
        assert done.returncode == 0, done.stdout
        for run in range(runs):
            run_dir, fault = Path(folder, f"run-{run}"), FAULTS[run % len(FAULTS)]
            process, when, rank = start(tiny(run_dir), "--max-restarts=1"), chance.uniform(0, 1.5), chance.randrange(2)
            while not (run_dir / "log.jsonl").exists() and process.poll() is None:
                time.sleep(0.005)
            time.sleep(when)
            inject(fault, process, rank, run_dir, chance)
            began = time.monotonic()
            told = process.communicate(timeout=300)[0]
            again = not (run_dir / "final").exists()  # a rank that was asked to stop ends with 0
            if again:
                second = torchrun(2, *tiny(run_dir))
                assert second.returncode == 0, second.stdout
            result = {
                "run": run,
                "fault": fault,
                "rank": rank,
                "seconds_after_log": round(when, 3),
                "restarted": "resumed" in told,
                "given_again": again,
                "seconds_to_end": round(time.monotonic() - began, 1),
                "same_weights": final_weights(run_dir) == final_weights(undisturbed),
                "same_log": log_lines(run_dir) == log_lines(undisturbed),
            }
            print(json.dumps(result), flush=True)
            assert result["same_weights"] and result["same_log"], told


if __name__ == "__main__":
    main(*(int(word) for word in (*sys.argv[1:], *("24", "0")[len(sys.argv) - 1 :])))
