"""What a run would be, without training it: data, model and options checked, steps, memory, an estimate of the time."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import NamedTuple

import torch

from ..config import Config, ConfigError
from ..data import QuadrupletDataset, collate
from ..data.curriculum import STAGES
from ..embeddings import embed_batch
from ..models import ClipModel
from ..runtime.precision import native_precision
from .dataset import open_data, split_rows
from .device import set_up_torch, settings_kept
from .frozen import open_for_training
from .fsdp import check_fsdp
from .prepare import check_inputs
from .run_folder import check_unused
from .text_only import SAID
from .trial import set_trainable, trial_step

MIB, GIB = 2**20, 2**30
PROBE = 8  # samples that are timed
BACKWARD = 3  # a step's time in forward passes: one forward, about two backward


class Plan(NamedTuple):
    """What a run would be."""

    samples: int  # that are trained on
    held_out: int
    steps: int
    passes: int  # forward passes of one sample through both encoders, over the whole run
    trained: int  # parameters
    parameters: int


def dry_run(config: Config) -> list[str]:
    """Opens what `config` names, the model included, and says what training would do; writes only data.cache_dir.

    Raises what train raises for options, data and model that do not fit.
    """
    check_fsdp(config)
    check_unused(config)
    check_inputs(config)
    with settings_kept():
        device = set_up_torch(config)
        precision = config.train.precision
        precision = native_precision(device) if precision == "auto" else precision
        clip, _ = open_for_training(config, device)
        trial_step(config, clip)
        dataset = open_data(config, config.data.train, clip)
        held_out = len(open_data(config, config.data.val, clip)) if config.data.val else None
        seconds = _time(clip, dataset, precision)
        set_trainable(config, clip)
        if config.data.text_only:
            print(SAID, flush=True)
        plan = _plan(config, clip, dataset, held_out)
    return _lines(config, clip, plan, device, precision, seconds)


def _plan(config: Config, clip: ClipModel, dataset: QuadrupletDataset, held_out: int | None) -> Plan:
    train, own = split_rows(len(dataset), 0 if config.data.val else config.data.val_fraction, config.seed)
    if len(train) < config.objective.k:
        raise ConfigError(f"objective.k={config.objective.k} is more than the {len(train)} training samples")
    sizes = epoch_sizes(len(train), config.train.epochs, config.curriculum.enabled)
    rounded = math.floor if min(sizes) >= config.train.batch_size else math.ceil  # as the Trainer counts
    steps = sum(rounded(size / config.train.batch_size) for size in sizes)
    held_out = len(own) if held_out is None else held_out
    micro = 0 < config.train.micro_batch_size < config.train.batch_size
    step_passes = BACKWARD + micro + config.train.checkpointing
    validations = config.train.epochs // config.validation.every_epochs if held_out else 0
    passes = len(dataset) + (held_out if config.data.val else 0) + validations * held_out + step_passes * sum(sizes)
    parameters = list(clip.model.parameters())
    trained = sum(p.numel() for p in parameters if p.requires_grad)
    return Plan(len(train), held_out, steps, passes, trained, sum(p.numel() for p in parameters))


def epoch_sizes(samples: int, epochs: int, curriculum: bool) -> list[int]:
    """Samples of each epoch, as CurriculumSampler has them."""
    stages = STAGES if curriculum else (1.0,)
    shares = [stages[min(epoch, len(stages)) - 1] for epoch in range(1, epochs + 1)]
    return [min(samples, math.ceil(share * samples - 1e-9)) for share in shares]


def _time(clip: ClipModel, dataset: QuadrupletDataset, precision: str) -> float:
    """Seconds of one forward pass of one sample, its images decoded beforehand: the second pass over a few counts."""
    batch = collate(clip.tokenizer)([dataset[index] for index in range(min(PROBE, len(dataset)))])
    seconds = 0.0
    with torch.no_grad():
        for _ in range(2):
            start = time.perf_counter()
            embed_batch(clip, batch, precision).safe_text.cpu()  # waits for the device
            seconds = time.perf_counter() - start
    return seconds / len(batch["index"])


def _lines(
    config: Config, clip: ClipModel, plan: Plan, device: torch.device, precision: str, seconds: float
) -> list[str]:
    width = clip.config["model_cfg"]["embed_dim"]
    weights = 4 * plan.parameters
    training = 4 * 3 * plan.trained  # gradients and two moments
    bank = _bank_bytes(config, width, plan.samples, device) if config.objective.bank == "resident" else 0
    embeddings = 4 * 4 * width * (plan.samples + plan.held_out)
    size = config.train.micro_batch_size or config.train.batch_size
    return [
        f"model: {clip.name}, {plan.parameters:,} parameters, of which {plan.trained:,} are trained; on {device}, "
        f"{precision}",
        f"data: {plan.samples:,} quadruplets to train on, {plan.held_out:,} held out",
        f"steps: {plan.steps:,} in {config.train.epochs} epochs of batches of {config.train.batch_size}",
        f"memory on {device}: {_bytes(weights)} of weights, {_bytes(training)} of gradients and moments, "
        f"{_bytes(bank)} of bank and rank guard, and the activations of {size} quadruplets, which only a step tells",
        f"disk: {_bytes(embeddings)} of frozen embeddings in {config.data.cache_dir}; "
        f"about {_bytes(weights + config.checkpoint.keep * training)} in {Path(config.run_dir)}",
        f"time: about {_duration(plan.passes * seconds)}, a guess from a forward pass here, {BACKWARD} of which make a "
        "step; reading images is not in it",
    ]


def _bank_bytes(config: Config, width: int, rows: int, device: torch.device) -> int:
    """Two float32 rows and a copy to search with; the guard has two such lists, a few columns wider."""
    row = (8 + (2 if device.type == "cuda" else 1)) * width
    guarded = config.objective.name == "saferclip" and config.objective.weights.rank_guard > 0
    return rows * row * (3 if guarded else 1)


def _bytes(count: float) -> str:
    return f"{count / GIB:.1f} GiB" if count >= GIB else f"{count / MIB:.1f} MiB"


def _duration(seconds: float) -> str:
    for size, name in ((86400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {name}"
    return f"{seconds:.1f} seconds"
