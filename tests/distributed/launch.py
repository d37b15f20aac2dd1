"""Starting real processes with torchrun; a launch costs seconds, so that many checks share one."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
TIMEOUT = 300


def torchrun(ranks: int, *words: str, options: tuple[str, ...] = (), **more) -> subprocess.CompletedProcess:
    """Run `python -m WORDS` on `ranks` processes of one thread each; returns when all have ended."""
    return subprocess.run(command(ranks, *words, options=options), env=environment(), **CAPTURED, **more)


CAPTURED = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "timeout": TIMEOUT, "check": False}


def command(ranks: int, *words: str, options: tuple[str, ...] = ()) -> list[str]:
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", *options]
    return [*run, "-m", *words]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}
