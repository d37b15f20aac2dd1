"""`make gpu-check` as far as a machine without a GPU can run it: its measurements at tiny sizes, its messages."""

import os
import subprocess
import sys

import pytest
import torch

from benchmarks.gpu import check as gpu_check
from tests.backends.simt.build import ROOT


def test_it_measures_every_op_and_way(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function: function)  # compiling is not what is tested here
    report = gpu_check.benchmark("cpu", repeats=2, small=True)
    assert not [r["error"] for r in report["results"] if r["error"]]
    measured = {(r["op"], r["way"]) for r in report["results"] if r["milliseconds"] > 0}
    for op in ("nearest_safe", "retarget_loss", "preservation_loss"):
        assert {(op, "saferclip_fast"), (op, "PyTorch"), (op, "torch.compile")} <= measured
    assert "| retarget_loss | B=8 d=32 k=1 | saferclip_fast |" in gpu_check.table(report)


def test_the_ways_compute_the_same(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function: function)
    torch.manual_seed(0)
    cases = [c for c in gpu_check.all_cases("cpu", small=True) if c.way != "torch.compile"]
    for ours, plain in zip(cases[::2], cases[1::2], strict=True):
        for a, b in zip(ours.run(), plain.run(), strict=True):
            torch.testing.assert_close(a, b, rtol=0.05, atol=0.02)


def test_an_op_that_fails_is_reported():
    def fail():
        raise RuntimeError("CUDA out of memory")

    result = gpu_check.measure(gpu_check.Case("op", "size", "way", fail), "cpu", (1.0, 1.0), 2)
    assert result.error == "CUDA out of memory"


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there: run make gpu-check")
def test_without_a_gpu_it_says_why():
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "benchmarks.gpu.check"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 1
    assert "gpu-check needs a CUDA GPU" in done.stderr
