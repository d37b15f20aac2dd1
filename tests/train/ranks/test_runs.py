"""Whole runs on two ranks that are stopped, killed and sharded end with the weights of a run that was left alone."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from saferclip_fast.config import load_config
from saferclip_fast.train import train
from tests.support.tiny import tiny_words
from tests.train.conftest import final_weights, log_lines
from tests.train.ranks.launch import TIMEOUT, start, torchrun, workers

pytestmark = pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs /proc to find torchrun's processes")


@pytest.fixture(scope="module")
def words(weights, tmp_path_factory):
    """words(run_dir, "key=value", ...) -> the command of the tiny run."""
    cache = tmp_path_factory.mktemp("cache")
    return lambda run_dir, *more: [
        "saferclip_fast.train",
        "--resume",
        "auto",
        *tiny_words(run_dir, weights, cache),
        *more,
    ]


def wait_for_lines(process: subprocess.Popen, run_dir: Path, lines: int) -> None:
    log, end = run_dir / "log.jsonl", time.monotonic() + TIMEOUT
    while not (log.exists() and log.read_bytes().count(b"\n") >= lines):
        assert process.poll() is None and time.monotonic() < end, process.communicate()[0]
        time.sleep(0.005)


def test_terminated_then_killed_run_ends_like_an_undisturbed_one(words, tmp_path):
    undisturbed, run_dir = tmp_path / "undisturbed", tmp_path / "run"
    done = torchrun(2, *words(undisturbed))
    assert done.returncode == 0 and "done: step 20" in done.stdout, done.stdout

    process = start(words(run_dir))
    wait_for_lines(process, run_dir, 1)
    for worker in workers(process.pid):
        os.kill(worker, signal.SIGTERM)  # as a scheduler does
    told = process.communicate(timeout=TIMEOUT)[0]
    assert process.returncode == 0 and "SIGTERM: saved step" in told, told
    assert not (run_dir / "final").exists()

    process = start(words(run_dir), "--max-restarts=1")
    wait_for_lines(process, run_dir, 4)
    (survivor, killed), when = workers(process.pid), time.monotonic()
    os.kill(killed, signal.SIGKILL)
    while Path(f"/proc/{survivor}").exists():  # it ends soon: train.timeout_minutes is ten
        assert time.monotonic() - when < 60
        time.sleep(0.01)
    told = process.communicate(timeout=TIMEOUT)[0]
    assert process.returncode == 0, told
    # the survivor hears of it from its exchange or from torchrun's signal, whichever comes first
    assert "error: rank 0 of 2 lost another rank" in told or "SIGTERM: stopped at once" in told, told
    assert told.count("resumed") == 2, told
    assert final_weights(run_dir) == final_weights(undisturbed)
    assert log_lines(run_dir) == log_lines(undisturbed)


def test_a_rank_that_hangs_is_given_up(words, tmp_path):
    process = start(words(tmp_path / "run", "train.timeout_minutes=0.05"))
    wait_for_lines(process, tmp_path / "run", 1)
    hanging, when = workers(process.pid)[1], time.monotonic()
    os.kill(hanging, signal.SIGSTOP)
    told = ""
    for line in process.stdout:
        told += line
        if "lost another rank" in line:
            os.kill(hanging, signal.SIGKILL)  # torchrun would do so half a minute later
    assert process.wait(TIMEOUT) != 0 and "error: rank 0 of 2 lost another rank" in told, told
    assert 2 < time.monotonic() - when < 60


def test_sliced_weights_train_as_whole_ones_do(words, weights, tmp_path):
    """Full tuning with train.fsdp, stopped and resumed, against one process."""
    options = ("model.tuning=full", "train.epochs=2", "optimizer.lr=1e-4", "train.ema=0.9", "train.batch_size=9")
    command = words(tmp_path / "sliced", *options, "train.fsdp=true")
    process = start(command)
    wait_for_lines(process, tmp_path / "sliced", 1)
    for worker in workers(process.pid):
        os.kill(worker, signal.SIGTERM)
    told = process.communicate(timeout=TIMEOUT)[0]
    assert process.returncode == 0 and "SIGTERM: saved step" in told, told
    done = torchrun(2, *command)
    assert done.returncode == 0 and "resumed" in done.stdout, done.stdout
    train(load_config(None, words(tmp_path / "whole", *options)[3:]))
    sliced, whole = (load_file(tmp_path / run / "final/open_clip_model.safetensors") for run in ("sliced", "whole"))
    began = load_file(weights)
    size, moved, apart = (
        torch.stack([(whole[n].double() - other[n]).norm() for n in whole]).norm().item()
        for other in ({n: 0 for n in whole}, began, sliced)
    )
    # Adam's first steps are as large for a gradient near zero, where rounding shows, as for any other
    assert apart < 1e-5 * size and apart < 5e-3 * moved, (size, moved, apart)
    for found, expected in zip(log_lines(tmp_path / "sliced"), log_lines(tmp_path / "whole"), strict=True):
        assert found.pop("kind") == expected.pop("kind")
        assert found == pytest.approx(expected, rel=1e-4, abs=1e-6)
