"""What torchrun runs on each rank: `python -m tests.benchmarks.two_ranks FILE`. A failed check ends it.

Both paths of benchmarks/speed/two_processes.py must give the gradient of the whole batch on one process.
"""

import argparse
import sys

import torch

from benchmarks.speed import two_processes
from benchmarks.speed.objective import setting
from saferclip_fast.runtime.ranks import Ranks, ranks

CASE = {"processes": 2, "B": 24, "d": 16, "k": 4, "bank_rows": 100}


def check_gradients(of: Ranks) -> None:
    known, mine = setting(16, 4, 100), of.split(24)
    current, frozen, neighbors = known.batch(24, 4)
    for x in current:
        x.requires_grad_()
    whole = torch.autograd.grad(known.objective(current, frozen, known.bank, neighbors).loss, current)
    for name, path in two_processes.paths(of, **CASE).items():
        for found, gradient in zip(path(), whole, strict=True):
            wanted = gradient[mine.start : mine.stop]
            assert wanted.any()
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5 * float(wanted.abs().max()), msg=name)


if __name__ == "__main__":
    with ranks() as processes:
        check_gradients(processes)
        two_processes.measure(processes, [CASE], argparse.Namespace(json=sys.argv[1], rounds=2, budget=1.0))
