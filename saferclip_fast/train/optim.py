"""The optimizer and its learning rate."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping

import torch
from torch import nn

from ..config import OptimizerOptions


def build_optimizer(options: OptimizerOptions, parameters: Mapping[str, nn.Parameter]) -> torch.optim.Optimizer:
    """Adam or AdamW, fused; weight decay on matrices only."""
    groups = [
        {"params": [p for p in parameters.values() if p.ndim >= 2], "weight_decay": options.weight_decay},
        {"params": [p for p in parameters.values() if p.ndim < 2], "weight_decay": 0.0},
    ]
    kind = torch.optim.Adam if options.name == "adam" else torch.optim.AdamW
    betas = (options.beta1, options.beta2)
    return kind([g for g in groups if g["params"]], options.lr, betas, options.eps, fused=True)


def learning_rate(options: OptimizerOptions, step: int, steps: int) -> float:
    """Rate of step `step` (from 0) of `steps`: linear warm-up, then constant or a cosine to 0."""
    if step < options.warmup_steps:
        return options.lr * (step + 1) / options.warmup_steps
    if options.schedule == "constant":
        return options.lr
    done = (step - options.warmup_steps) / max(1, steps - options.warmup_steps)
    return options.lr * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


def check_all_used(parameters: Mapping[str, nn.Parameter]) -> None:
    """Raises ValueError if a trainable parameter took no part in the first backward pass."""
    unused = [name for name, p in parameters.items() if p.grad is None]
    if unused:
        shown = ", ".join(itertools.islice(unused, 3))
        raise ValueError(
            f"{len(unused)} trainable parameters take no part in the embeddings ({shown} ...): "
            "choose other lora.targets for this model"
        )
