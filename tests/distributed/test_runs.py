"""Whole runs on two ranks that are stopped and killed end with the weights of a run that was left alone."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from ..train.conftest import final_weights, log_lines
from ..train.tiny import tiny_words
from .launch import TIMEOUT, start, torchrun, workers

pytestmark = pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs /proc to find torchrun's processes")


@pytest.fixture(scope="module")
def words(weights, tmp_path_factory):
    """words(run_dir) -> the command of the tiny run."""
    cache = tmp_path_factory.mktemp("cache")
    return lambda run_dir: ["saferclip_fast.train", "--resume", "auto", *tiny_words(run_dir, weights, cache)]


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
    killed, when = workers(process.pid)[1], time.monotonic()
    os.kill(killed, signal.SIGKILL)
    told = process.communicate(timeout=TIMEOUT)[0]
    assert process.returncode == 0, told
    assert time.monotonic() - when < 60
    assert "error: rank 0 of 2 lost another rank" in told and told.count("resumed") == 2, told
    assert final_weights(run_dir) == final_weights(undisturbed)
    assert log_lines(run_dir) == log_lines(undisturbed)
