"""The state of a run: all that a checkpoint holds and a resumed run needs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from ..config import Config
from ..models import ClipModel
from ..models.identity import Identity
from ..models.lora import start_tensors
from ..runtime.ranks import Ranks
from .checkpoint import CheckpointFolder
from .device import grad_scaler
from .ema import WeightAverage
from .fsdp import sliced_like
from .optim import build_optimizer
from .runlog import Meter


@dataclass
class Progress:
    """How far a run has come; everything that a checkpoint needs besides tensors."""

    step: int = 0
    epoch: int = 1
    seen: int = 0  # samples of this epoch
    best_score: float | None = None  # of the validations so far; less is better
    best_step: int = 0
    stale: int = 0  # validations since the best one
    finished: bool = False
    log_bytes: int = 0


@dataclass
class RunState:
    """One run on one of its ranks: weights, optimizer, loss scaler, weight average, meter, progress, ranks."""

    config: Config
    clip: ClipModel
    data_hash: str  # of the samples that are trained and validated on
    ranks: Ranks
    trainable: dict[str, torch.nn.Parameter]
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    average: WeightAverage | None
    meter: Meter = field(default_factory=Meter)
    progress: Progress = field(default_factory=Progress)
    frozen: Identity | None = None  # what is tuned

    @classmethod
    def start(cls, config: Config, clip: ClipModel, data_hash: str, ranks: Ranks) -> RunState:
        """The state before the first step. `clip` has its trainable parameters set, and its weights where they stay."""
        trainable = {name: p for name, p in clip.model.named_parameters() if p.requires_grad}
        return cls(
            config,
            clip,
            data_hash,
            ranks,
            trainable,
            build_optimizer(config.optimizer, trainable),
            grad_scaler(clip.device, config.train.precision),
            WeightAverage(trainable, config.train.ema) if config.train.ema else None,
        )

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.clip.device

    @property
    def run_dir(self) -> Path:
        """The run's folder."""
        return Path(self.config.run_dir)

    @property
    def checkpoints(self) -> CheckpointFolder:
        """The run's checkpoint files."""
        return CheckpointFolder(self.run_dir / "checkpoints", self.config.checkpoint.keep)

    def trained_tensors(self) -> dict[str, Tensor]:
        """What training makes: trainable parameters, the adapters' start and, in full tuning, buffers (batch norm)."""
        tensors: dict[str, Tensor] = {f"model.{name}": p for name, p in self.trainable.items()}
        tensors |= {f"model.{name}": tensor for name, tensor in start_tensors(self.clip.model).items()}
        if self.config.model.tuning == "full":
            names = dict(self.clip.model.named_buffers())
            tensors |= {f"model.{n}": t for n, t in self.clip.model.state_dict().items() if n in names}
        return tensors

    def load_trained(self, tensors: Mapping[str, Tensor]) -> None:
        """Inverse of trained_tensors."""
        own = self.clip.model.state_dict()
        with torch.no_grad():
            for key in self.trained_tensors():
                target = own[key.removeprefix("model.")]
                target.copy_(sliced_like(target, tensors[key]))
