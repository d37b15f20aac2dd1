"""A tiny run that takes about a second, and processes to run and kill it in."""

import json
import multiprocessing
import sys
from pathlib import Path

import pytest
import torch

from saferclip_fast.train import train
from tests.support.tiny import tiny as tiny_config

# Children are forked from a server that has imported everything and started no threads. The package imports its parts
# when they are first used, so the parts are named: the trainer brings all that a run needs.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["saferclip_fast.train.trainer"])


@pytest.fixture(autouse=True)
def torch_settings():
    """One thread, which is fastest at this size; afterwards put back what a run sets for all of torch."""
    threads, precision = torch.get_num_threads(), torch.get_float32_matmul_precision()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    torch.set_float32_matmul_precision(precision)
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="session")
def cache(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def tiny(weights, cache):
    """tiny(run_dir, "key=value", ...) -> Config of 20 steps in 3 epochs with dropout, curriculum and validation."""
    return lambda run_dir, *overrides: tiny_config(run_dir, weights, cache, *overrides)


@pytest.fixture(scope="session")
def undisturbed(tiny, tmp_path_factory) -> Path:
    """Run folder of the tiny run, never interrupted."""
    run_dir = tmp_path_factory.mktemp("undisturbed") / "run"
    code = run_child(train_child, tiny(run_dir))
    assert code == 0
    return run_dir


def train_child(config) -> None:
    """Body of a child process: train, exit with 0, or 10 if a signal stopped the run."""
    sys.exit(0 if train(config).weights is not None else 10)


def run_child(target, *arguments) -> int:
    process = PROCESSES.Process(target=target, args=arguments)
    process.start()
    process.join(300)
    return process.exitcode


def final_weights(run_dir: Path) -> bytes:
    return (run_dir / "final" / "open_clip_model.safetensors").read_bytes()


def log_lines(run_dir: Path) -> list[dict]:
    """The log without the one value that depends on the clock."""
    lines = [json.loads(line) for line in (run_dir / "log.jsonl").read_text().splitlines()]
    for line in lines:
        line.pop("samples_per_second", None)
    return lines


def validations(run_dir):
    return [line for line in log_lines(run_dir) if line["kind"] == "val"]
