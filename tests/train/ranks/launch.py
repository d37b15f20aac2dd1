"""Starting real processes with torchrun; a launch costs seconds, so that many checks share one."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[3]
TIMEOUT = 300


def torchrun(ranks: int, *words: str) -> subprocess.CompletedProcess:
    """Run `python -m WORDS` on `ranks` processes of one thread each; returns when all have ended."""
    return subprocess.run(command(ranks, *words), **streams(), timeout=TIMEOUT, check=False)


def start(words: list[str], *options: str) -> subprocess.Popen:
    """The same on two ranks, with torchrun's `options`, without waiting for the end."""
    return subprocess.Popen(command(2, *words, options=options), **streams())


def command(ranks: int, *words: str, options: tuple[str, ...] = ()) -> list[str]:
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", *options]
    return [*run, "-m", *words]


def streams() -> dict:
    quiet = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}
    return {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "env": {**os.environ, **quiet}}


def workers(launcher: int) -> list[int]:
    """Process numbers of the ranks that a torchrun process started, in order of rank."""
    found = {}
    for child in Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split():
        variables = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
        rank = next((v for v in variables if v.startswith(b"RANK=")), None)
        if rank is not None:
            found[int(rank.split(b"=")[1])] = int(child)
    return [found[rank] for rank in sorted(found)]
