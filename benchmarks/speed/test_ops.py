"""pytest-benchmark suite of the ops, for comparing commits on one machine: benchmarks/README.md says how."""

from __future__ import annotations

import pytest
import torch

from benchmarks import harness
from benchmarks.speed import bank, nearest_safe, preservation_loss, retarget_loss

CASES = {
    **{f"nearest_safe {q}x{n} k{k}": ("search", q, n, k) for q, n, k in ((1, 64, 1), (64, 1000, 8), (256, 30_000, 8))},
    "retarget_loss B64": ("retarget", 64),
    "retarget_loss B4096": ("retarget", 4096),
    "preservation_loss B64": ("preservation", 64),
    "preservation_loss B2048": ("preservation", 2048),
    "pack_bank N30000": ("pack", 30_000),
}
PATHS = ("ours", "ours_packed", "eager")  # a packed bank is for searches


def paths(op: str, *sizes: int) -> harness.Paths:
    torch.manual_seed(0)
    if op == "search":
        q, n, k = sizes
        rows = nearest_safe.gaussian(n, 768)
        return nearest_safe.paths(torch.randn(q, 768), rows, nearest_safe.packed_bank(rows), k, compiled=False)
    if op == "retarget":
        return retarget_loss.paths(*sizes, d=768, k=1, bank_rows=30_000, **{"pass": "both"})
    if op == "preservation":
        return preservation_loss.paths(*sizes, d=768, **{"pass": "both"})
    return bank.pack(*sizes, d=768)


@pytest.mark.parametrize(
    ("name", "path"),
    [(name, path) for name, (op, *_) in CASES.items() for path in PATHS if op == "search" or path != "ours_packed"],
)
def test_op(benchmark, name, path):
    benchmark.group = name
    benchmark(paths(*CASES[name])[path])
