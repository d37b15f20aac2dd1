"""Settings of the device: threads, precision, determinism, autocast, loss scaling."""

from __future__ import annotations

import os
import shutil
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.utils.deterministic
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ..config import Config, ConfigError
from ..runtime.ranks import Ranks, local_rank

_deterministic: Any = torch.utils.deterministic


def set_up_torch(config: Config) -> torch.device:
    """Seeds, threads, precision and determinism; returns the device.

    Raises ConfigError for a device that is not there.
    """
    name = config.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"device={name!r} is none: use auto, cpu, cuda or cuda:N") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"device={name}: torch sees no CUDA device here; use device=cpu")
    if device.type == "cuda":
        if device.index is None:
            device = torch.device("cuda", local_rank())
        elif local_rank():
            raise ConfigError(f"device={name}: several ranks would share one GPU; use device=cuda, one GPU each")
        torch.cuda.set_device(device)
    if config.threads:
        torch.set_num_threads(config.threads)
    torch.set_float32_matmul_precision("high" if config.train.tf32 else "highest")
    if config.train.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)  # with warn_only the backward pass of attention stays as it was
        _deterministic.fill_uninitialized_memory = False
    torch.manual_seed(config.seed)
    return device


@contextmanager
def naming_train_deterministic() -> Iterator[None]:
    """Turns torch's error for an op that has no deterministic kernel into a ConfigError."""
    try:
        yield
    except RuntimeError as error:
        if "does not have a deterministic implementation" not in str(error):
            raise
        raise ConfigError(
            f"train.deterministic=true: {str(error).split(',')[0]}; train.deterministic=false trains without it"
        ) from error


@contextmanager
def settings_kept() -> Iterator[None]:
    """Afterwards torch is set up as before: threads, precision, determinism, random numbers. For callers in Python."""
    threads, precision = torch.get_num_threads(), torch.get_float32_matmul_precision()
    deterministic = torch.are_deterministic_algorithms_enabled()
    warns, fills = torch.is_deterministic_algorithms_warn_only_enabled(), _deterministic.fill_uninitialized_memory
    try:
        with torch.random.fork_rng():
            yield
    finally:
        torch.set_num_threads(threads)
        torch.set_float32_matmul_precision(precision)
        torch.use_deterministic_algorithms(deterministic, warn_only=warns)
        _deterministic.fill_uninitialized_memory = fills


def grad_scaler(device: torch.device, precision: str) -> torch.amp.GradScaler:
    """Scales the loss in "fp16", so that small gradients do not vanish; otherwise does nothing.

    From torch's first scale, 2**16, the gradients of this objective overflow: the first three steps of 20 were
    left out and the first 0 from 2**10 (tests/train/test_train.py).
    """
    return torch.amp.GradScaler(device.type, init_scale=2.0**10, enabled=precision == "fp16")


def compile_encoders(clip: nn.Module) -> None:
    """From its next call on `clip` runs through torch.compile, one graph for captions of every length.

    Dropout draws the numbers that it draws without, so that both passes over a micro-batch have the same.
    Raises ConfigError where a compiler is missing.
    """
    compiler = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
    if shutil.which(compiler) is None:
        raise ConfigError(
            f"train.compile=true needs a C++ compiler, and there is no {compiler}: install it, or set CXX"
        )
    torch._dynamo.config.optimize_ddp = False  # it cuts graphs where gradients are exchanged, and fails on free sizes
    clip.compile(dynamic=True, options={"fallback_random": True})


def data_parallel(model: nn.Module, ranks: Ranks) -> DistributedDataParallel | None:
    """`model` with its gradients averaged over the ranks, None for one process; the first rank's weights go to all."""
    if ranks.world == 1:
        return None
    device = next(model.parameters()).device
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # broadcast_buffers gets another name in torch 2.14
        return DistributedDataParallel(
            model,
            device_ids=[device] if device.type == "cuda" else None,
            broadcast_buffers=False,  # no buffer changes: check_micro_batches refuses batch norm
            gradient_as_bucket_view=True,
        )
