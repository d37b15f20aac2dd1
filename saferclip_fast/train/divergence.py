"""Steps whose loss or gradient is not finite: they leave the weights alone, and are named when the log is written."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import Subset

from ..data import CurriculumSampler

NAMED_ROWS = 8


@dataclass(frozen=True)
class Step:
    """Which samples a step saw: `rows` of epoch `epoch`, from the `first` on."""

    number: int
    epoch: int
    first: int
    count: int


class FiniteWatch:
    """Remembers on the device which steps were finite, so that no step waits."""

    def __init__(self) -> None:
        self.steps: list[Step] = []
        self.finite: list[Tensor] = []

    def note(self, step: Step, finite: Tensor) -> None:
        """`finite`: a bool scalar, the same on all ranks."""
        self.steps.append(step)
        self.finite.append(finite)

    def failed(self) -> list[Step]:
        """The steps that were not finite, of those since the last call. Waits for the device."""
        if not self.steps:
            return []
        finite = torch.stack(self.finite).tolist()
        failed = [step for step, good in zip(self.steps, finite, strict=True) if not good]
        self.steps, self.finite = [], []
        return failed


def leave_out(optimizer: torch.optim.Optimizer, finite: Tensor) -> None:
    """The next step of a fused optimizer changes nothing if the device says that the gradient is not finite.

    This is the way in which GradScaler tells a fused optimizer to skip.
    """
    optimizer.grad_scale = None  # type: ignore[attr-defined]
    optimizer.found_inf = (~finite).float()  # type: ignore[attr-defined]


def report(step: Step, sampler: CurriculumSampler, samples: Subset, on_nan: str, warn: bool) -> None:
    """Name a step that was not finite: raise FloatingPointError ("stop"), or warn of it ("skip")."""
    index = sampler.epoch_indices(step.epoch)[step.first : step.first + step.count]
    named = _sources(samples, index[:NAMED_ROWS].tolist())
    more = f" and {len(index) - NAMED_ROWS} more" if len(index) > NAMED_ROWS else ""
    message = f"the loss or its gradient is not finite in step {step.number} (epoch {step.epoch}, {named}{more})"
    if on_nan == "stop":
        raise FloatingPointError(
            f"{message}: lower optimizer.lr, set optimizer.clip_norm, use train.precision=fp32, or leave such steps "
            "out with train.on_nan=skip; the last checkpoint is from before"
        )
    if warn:
        warnings.warn(f"{message}; it was left out", stacklevel=2)


def check_finite(means: Mapping[str, float], step: int) -> None:
    """Raises FloatingPointError if a mean over validation, or over steps none of which was finite, is not a number."""
    if not all(map(math.isfinite, means.values())):
        raise FloatingPointError(
            f"the loss is not finite after step {step} ({means}): lower optimizer.lr, set optimizer.clip_norm, or use "
            "train.precision=fp32; the last checkpoint is from before"
        )


def _sources(samples: Subset, positions: Sequence[int]) -> str:
    """The file and rows that samples come from."""
    files: dict[str, list[str]] = {}
    for position in positions:
        record = samples.dataset.records[samples.indices[position]]  # type: ignore[attr-defined]
        files.setdefault(record.file, []).append(str(record.row))
    return ", ".join(f"{file} rows {', '.join(rows)}" for file, rows in files.items())
