"""Kill a random rank at a random moment, again and again: `python -m tests.train.ranks.random_kills [RUNS] [SEED]`.

Each run is started as a user starts it, `torchrun --max-restarts`; its final weights and log must be, bit for bit,
those of a run that was left alone. The test suite has one such run; this takes minutes.
"""

import json
import os
import random
import signal
import sys
import tempfile
import time
import warnings
from pathlib import Path

import torch

from saferclip_fast.models import load_clip
from tests.support.tiny import tiny_words
from tests.train.conftest import final_weights, log_lines
from tests.train.ranks.launch import start, torchrun, workers


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
            run_dir = Path(folder, f"run-{run}")
            process, when, rank = start(tiny(run_dir), "--max-restarts=1"), chance.uniform(0, 1.5), chance.randrange(2)
            while not (run_dir / "log.jsonl").exists() and process.poll() is None:
                time.sleep(0.005)
            time.sleep(when)
            alive = workers(process.pid)
            killed = rank < len(alive)
            if killed:
                os.kill(alive[rank], signal.SIGKILL)
            began = time.monotonic()
            told = process.communicate(timeout=300)[0]
            same = process.returncode == 0 and final_weights(run_dir) == final_weights(undisturbed)
            result = {
                "run": run,
                "rank": rank if killed else None,
                "seconds_after_log": round(when, 3),
                "restarted": "resumed" in told,
                "seconds_to_end": round(time.monotonic() - began, 1),
                "same_weights": same,
                "same_log": same and log_lines(run_dir) == log_lines(undisturbed),
            }
            print(json.dumps(result), flush=True)
            assert result["same_weights"] and result["same_log"], told


if __name__ == "__main__":
    main(*(int(word) for word in (*sys.argv[1:], *("20", "0")[len(sys.argv) - 1 :])))
