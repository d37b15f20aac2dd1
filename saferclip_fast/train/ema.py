"""An exponential moving average of the trained weights (Polyak averaging), to validate and export in their place."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn

from .fsdp import sliced_like


class WeightAverage:
    """average <- d average + (1 - d) weights after every step, d = min(decay, (1 + n) / (10 + n)) after step n.

    The smaller d of the first steps (as in TensorFlow's ExponentialMovingAverage) lets the average leave the weights
    that training began with soon. What is not trained, and buffers, are not averaged.
    """

    def __init__(self, parameters: Mapping[str, Tensor], decay: float) -> None:
        """parameters: the trained ones by name, as they are before the first step; kept, and read by update."""
        if not 0 < decay < 1:
            raise ValueError(f"decay={decay} must lie between 0 and 1")
        self.parameters, self.decay = parameters, decay
        self.average = {name: parameter.detach().clone() for name, parameter in parameters.items()}

    def update(self, step: int) -> None:
        """Take in the parameters as optimizer step `step` (1 for the first) left them."""
        decay = min(self.decay, (1 + step) / (10 + step))
        average = get_ema_multi_avg_fn(decay)
        average([*self.average.values()], [p.detach() for p in self.parameters.values()], step)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The parameters hold the average inside, and afterwards what they held before, bit for bit."""
        own = {name: parameter.detach().clone() for name, parameter in self.parameters.items()}
        self._fill(self.average)
        try:
            yield
        finally:
            self._fill(own)

    def pack(self) -> dict[str, Tensor]:
        """The average as tensors "ema.<parameter>" for a checkpoint."""
        return {f"ema.{name}": tensor for name, tensor in self.average.items()}

    def unpack(self, tensors: Mapping[str, Tensor]) -> None:
        """Inverse of pack."""
        for name, tensor in self.average.items():
            tensor.copy_(sliced_like(tensor, tensors[f"ema.{name}"]))

    @torch.no_grad()
    def _fill(self, values: Mapping[str, Tensor]) -> None:
        for name, parameter in self.parameters.items():
            parameter.copy_(values[name])
