"""The default objective of one batch on two processes of one thread each (gloo), against the same in plain PyTorch.

Loss and the gradients of each process's own rows, from given embeddings: a training step without its encoders. `ours`
exchanges what training does (docs/scale.md). `eager` gathers the rows of both sides with autograd, as open_clip does
with local_loss and gather_with_grad. Each call begins when both processes are there; its time is the slower one's.

    python -m benchmarks.speed.two_processes [--json FILE]    starts both
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Callable

import torch
import torch.nn.functional as F
from open_clip.loss import gather_features
from torch import Tensor

from benchmarks import harness
from benchmarks.speed.objective import guard_rows, plain_objective, setting
from saferclip_fast import Neighbors
from saferclip_fast.data.quadruplets import QuadrupletEmbeddings
from saferclip_fast.runtime.ranks import Ranks, ranks

PROCESSES = 2
# a smaller bank than in objective.py: each process prepares its guards on one thread
CASES = [{"processes": PROCESSES, "B": B, "d": 768, "k": 16, "bank_rows": 20_000} for B in (1024, 4096)]


def gathered_info_nce(of: Ranks) -> Callable[[Tensor, Tensor], Tensor]:
    """InfoNCE of this process's rows against those of all, whose gradients travel back: open_clip's ClipLoss."""

    def contrast(x: Tensor, y: Tensor) -> Tensor:
        u, v = F.normalize(x, dim=1), F.normalize(y, dim=1)
        all_u, all_v = gather_features(u, v, local_loss=True, gather_with_grad=True, rank=of.rank, world_size=of.world)
        label = torch.arange(len(x)) + of.rank * len(x)  # as open_clip: all hold as many rows
        return (F.cross_entropy(100 * u @ all_v.T, label) + F.cross_entropy(100 * v @ all_u.T, label)) / 2

    return contrast


def paths(of: Ranks, B: int, d: int, k: int, bank_rows: int, **_: int) -> harness.Paths:
    """The gradients of this process's rows of the batch's loss, by both."""
    known = setting(d, k, bank_rows)
    mine = slice(of.split(B).start, of.split(B).stop)
    whole = known.batch(B, k)
    current, frozen = (QuadrupletEmbeddings(*(rows[mine] for rows in side)) for side in whole[:2])
    neighbors = Neighbors(*(column[mine] for column in whole[2]))
    for x in current:
        x.requires_grad_()
    given = current, frozen, known.bank, neighbors
    rows, contrast = guard_rows(known.objective), gathered_info_nce(of)

    def ours() -> Tensor:
        return known.objective(*given, share=of.share(B)).loss

    def eager() -> Tensor:
        loss = plain_objective(*given, rows, known.objective, contrast)
        return loss * of.share(B).fraction  # a mean over these rows: its part of the batch's

    return {
        "ours": lambda: torch.autograd.grad(ours(), current),
        "eager": lambda: torch.autograd.grad(eager(), current),
    }


def slowest(of: Ranks, call: Callable[[], object]) -> float:
    """Seconds of the slower process; the same number on both."""
    of.wait()
    start = time.perf_counter_ns()
    call()
    return of.largest(time.perf_counter_ns() - start) / 1e9


def measure(of: Ranks, cases: list[dict], args: argparse.Namespace) -> None:
    """The first process alone reads and writes the results; memory is its own."""
    torch.set_num_threads(1)
    results = harness.Results("default objective, two processes", args.json) if of.first else None
    for case in cases:
        if of.largest(results is not None and results.has(case)):
            continue
        found = harness.measure(paths(of, **case), args.rounds, args.budget, clock=lambda call: slowest(of, call))
        if results is not None:
            results.add(case, found)


def start() -> int:
    """The same command on two processes; its exit status."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={PROCESSES}"]
    command = [sys.executable, *torchrun, "-m", "benchmarks.speed.two_processes", *sys.argv[1:]]
    return subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}).returncode


if __name__ == "__main__":
    arguments = harness.parser(__doc__, 5, 30).parse_args()
    if "WORLD_SIZE" not in os.environ:
        sys.exit(start())
    warnings.filterwarnings("ignore", "torch.distributed.nn.functional.all_gather is deprecated", FutureWarning)
    with ranks() as processes:
        measure(processes, CASES, arguments)
