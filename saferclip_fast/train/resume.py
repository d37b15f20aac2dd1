"""The state of a run, with which it goes on as if it had never stopped: saved in a checkpoint, and put back."""

from __future__ import annotations

import hashlib
import json
import warnings
from dataclasses import asdict

import torch
from torch import Tensor

from ..config import flatten
from .checkpoint import check_same_run, pack_optimizer, read_checkpoint, unpack_optimizer
from .fsdp import gathered
from .rng import pack_rng, unpack_rng
from .state import Progress, RunState


def save_run(run: RunState) -> None:
    """Write a checkpoint of everything that the next step depends on; every rank gives its part."""
    own = pack_rng(run.device)
    if run.meter.total is not None:
        own["meter.total"] = run.meter.total
    of_ranks = {name: run.ranks.stack(value.to(run.device)) for name, value in own.items()}
    tensors = run.trained_tensors() | pack_optimizer(run.optimizer)
    if run.average is not None:
        tensors |= run.average.pack()
    tensors = gathered(tensors, run.ranks.first)
    if not run.ranks.first:
        return
    state = {
        "progress": asdict(run.progress),
        "scaler": run.scaler.state_dict(),
        "meter": run.meter.names,
        "ranks": run.ranks.world,
        "config": flatten(run.config),
        **hashes(run),
    }
    if run.frozen is not None:
        state["frozen"] = run.frozen.as_json()
    run.checkpoints.save(run.progress.step, tensors | of_ranks, state)


def restore_run(run: RunState) -> bool:
    """Continue from the newest readable checkpoint; False if there is none.

    Raises CheckpointError where the run would not be the same: other options, weights or data.
    """
    checkpoint = run.checkpoints.load_newest() if run.ranks.first else None
    step = run.ranks.largest(checkpoint.state["progress"]["step"] if checkpoint else -1)
    if step < 0:
        return False
    if checkpoint is None:
        checkpoint = read_checkpoint(run.checkpoints.path(step))
    tensors, state = checkpoint.tensors, checkpoint.state
    check_same_run(checkpoint.path, state, flatten(run.config), hashes(run))
    run.load_trained(tensors)
    unpack_optimizer(run.optimizer, tensors)
    if run.average is not None:
        run.average.unpack(tensors)
    run.scaler.load_state_dict(state["scaler"])
    run.progress = Progress(**state["progress"])
    run.meter.names = state["meter"]
    restore_rank(run, tensors, state["ranks"])
    if run.ranks.first:
        print(f"resumed {checkpoint.path}: step {step}, epoch {run.progress.epoch}", flush=True)
    return True


def restore_rank(run: RunState, tensors: dict[str, Tensor], world: int) -> None:
    """Put back what differs from rank to rank: random state and sums for the log, stacked over `world` ranks."""
    rank, total = run.ranks.rank, tensors.get("meter.total")
    if world == run.ranks.world:
        unpack_rng(run.device, {name: value[rank] for name, value in tensors.items() if name.startswith("rng.")})
        run.meter.total = None if total is None else total[rank].to(run.device)
        return
    if run.ranks.first:
        warnings.warn(f"{world} ranks before, {run.ranks.world} now: other dropout and rounding", stacklevel=2)
    if total is not None:
        run.meter.total = (total.sum(0) if run.ranks.first else torch.zeros_like(total[0])).to(run.device)


def hashes(run: RunState) -> dict[str, str]:
    """Hashes of the weights, preprocessing and data that the run is made of, wherever they lie."""
    preprocessing = json.dumps(run.clip.preprocessing, sort_keys=True)  # a tag may bring its own
    return {
        "weights_hash": run.clip.weights_hash,
        "preprocessing_hash": hashlib.sha256(preprocessing.encode()).hexdigest(),
        "data_hash": run.data_hash,
    }
