"""`make gpu-check` as far as a machine without a GPU can run it: a rehearsal with no network, a kill, the deadline."""

import json
import os
import signal
import subprocess
import sys
import time
import zipfile

import numpy
import pytest
import torch

from benchmarks.gpu import cases, check, measure, rivals
from tests.backends.simt.build import ROOT

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there: run make gpu-check")


@pytest.fixture(autouse=True)
def neither_compiled_nor_interpreted(monkeypatch):
    """Compiling is not what is tested here, and an interpreted kernel takes seconds."""
    monkeypatch.setattr(torch, "compile", lambda function: function)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    backends = cases.backends
    monkeypatch.setattr(cases, "backends", lambda op: [name for name in backends(op) if name != "triton"])


@pytest.mark.parametrize("op", measure.OPS)
def test_every_op_is_timed_on_every_backend_and_a_second_call_goes_on(op, tmp_path):
    lines = measure.Lines(tmp_path / "lines.jsonl")
    assert measure.times(lines, op, "cpu", 0, small=True) == 3 and not lines.rows  # no time
    assert measure.times(lines, op, "cpu", 60, small=True) == 0
    assert not [row["error"] for row in lines.rows if row["error"]]
    assert {"cpu", "reference", "PyTorch", "torch.compile"} <= {row["way"] for row in lines.rows}
    text = lines.path.read_text()
    lines.path.write_text(text[:-9])  # the last line is cut off
    measure.times(measure.Lines(lines.path), op, "cpu", 60, small=True)
    assert lines.path.read_text().startswith(text[: text.rfind("\n", 0, -1)])
    assert len(lines.path.read_text().splitlines()) == len(lines.rows)


def test_the_ways_compute_the_same():
    torch.manual_seed(0)
    for op in measure.OPS:
        found = {}
        for case in measure.timed_cases(op, "cpu", small=True):
            found.setdefault(case.size, []).append(case.run())
        for first, *others in found.values():
            for other in others:
                for a, b in zip(first, other, strict=True):
                    torch.testing.assert_close(a, b, rtol=0.05, atol=0.02)


def test_a_wrong_kernel_is_found_at_first_contact(tmp_path, monkeypatch):
    real = measure.select

    def one_row_wrong(op, backend, device, dtype):
        kernel = real(op, backend, device, dtype)

        def wrong(*arguments):
            *others, image = kernel(*arguments)
            image[-1] *= 0.5
            return *others, image

        return wrong if backend == "cpu" and op == "preservation_loss" else kernel

    monkeypatch.setattr(measure, "select", one_row_wrong)
    lines = measure.Lines(tmp_path / "lines.jsonl")
    assert measure.smoke(lines, "cpu") == 3
    assert {row["op"] for row in lines.rows if not row["ok"]} == {"preservation_loss"}


def test_an_op_that_fails_is_reported():
    def fail():
        raise RuntimeError("CUDA out of memory")

    result = cases.measure(cases.Case("op", "size", "way", fail), "cpu", (1.0, 1.0), 2)
    assert result.error == "CUDA out of memory"


def test_predictions_are_compared():
    row = {"op": "preservation_loss", "size": "B=4,096 d=768 bfloat16", "way": "cuda", "error": ""}
    held, not_held = check.held([row | {"milliseconds": 0.6}, row | {"milliseconds": 6.0}], "NVIDIA H100 80GB HBM3")
    assert held.endswith("measured 0.6 ms: held") and not_held.endswith("did not hold")


def test_a_rival_says_its_version_and_what_differs():
    assert (
        rivals.named("numpy", "nobody-has-this", "numpy", differs="no tie rule")
        == f"numpy {numpy.__version__} (no tie rule)"
    )
    assert rivals.named("nobody_has_this") is None
    if hasattr(torch.nn.functional, "linear_cross_entropy"):
        assert any(way.startswith(f"F.linear_cross_entropy {torch.__version__} (") for way in rivals.contrast("cpu", 4))


def start(results, wheels, seconds):
    environment = {**os.environ, "SAFERCLIP_GPU_RESULTS": str(results), "SAFERCLIP_GPU_WHEELS": str(wheels)}
    environment.pop("TRITON_INTERPRET", None)
    environment |= {"PYTHONPATH": str(ROOT), "PIP_NO_INDEX": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "benchmarks.gpu.check", "--seconds", str(seconds)]
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, start_new_session=True
    )


def test_rehearsal_goes_on_after_a_kill_and_keeps_its_deadline(tmp_path):
    wheels, results = tmp_path / "wheels", tmp_path / "results"
    wheels.mkdir()
    with zipfile.ZipFile(wheels / "rehearsed-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("rehearsed.py", "")
        wheel.writestr("rehearsed-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: rehearsed\nVersion: 1.0\n")
        wheel.writestr(
            "rehearsed-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr("rehearsed-1.0.dist-info/RECORD", "")
    first, begin = start(results, wheels, 120), time.monotonic()
    state = results / "state.json"
    while not (state.exists() and json.loads(state.read_text()).get("facts", {}).get("code") == 0):
        assert first.poll() is None and time.monotonic() - begin < 100
        time.sleep(0.1)
    os.killpg(first.pid, signal.SIGKILL)
    first.communicate()
    before = (results / "lines.jsonl").read_text()
    second = start(results, wheels, 120)
    shown = second.communicate()[0]
    assert second.returncode == 1 and "left out: torch sees no GPU" in shown and "wheels" not in shown
    ends = json.loads(state.read_text())
    assert [ends[name]["code"] for name in ("wheels", "facts", "smoke", "device")] == [0, 0, 0, None]
    assert (results / "lines.jsonl").read_text().startswith(before)
    smoke = [json.loads(line) for line in (results / "lines.jsonl").read_text().splitlines()[1:]]
    assert {row["op"] for row in smoke} == set(measure.OPS) and all(row["ok"] for row in smoke)
    assert len({row["case"] for row in smoke if row["op"] == "info_nce"}) == 3
    assert sum(1 for file in results.rglob("*") if file.is_file()) <= 6
    late, begin = start(tmp_path / "late", wheels, 1), time.monotonic()
    assert "left out: no time" in late.communicate()[0] and time.monotonic() - begin < 30
