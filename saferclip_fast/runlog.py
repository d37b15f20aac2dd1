"""What a run says of itself: a JSON line per logged step, TensorBoard, a progress bar."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm


class RunLog:
    """Writes RUN_DIR/log.jsonl and RUN_DIR/tensorboard, and shows a bar.

    A checkpoint remembers `sync()`; a resumed run cuts the file back to there, so no line is torn or doubled.
    """

    def __init__(self, run_dir: Path, *, offset: int, step: int, tensorboard: bool, progress: bool) -> None:
        """
        Args:
            run_dir: the run's folder.
            offset: bytes of log.jsonl to keep, 0 for a new run.
            step: steps done already; TensorBoard hides what an interrupted run wrote after it.
            tensorboard, progress: whether to have them.
        """
        path = run_dir / "log.jsonl"
        self.file = path.open("ab")
        self.file.truncate(offset)
        self.writer = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter  # slow to import

            self.writer = SummaryWriter(str(run_dir / "tensorboard"), purge_step=step + 1 if step else None)
        self.progress = progress
        self.bar: tqdm | None = None

    def write(self, kind: str, step: int, values: Mapping[str, float], **extra: float) -> None:
        """One line {"kind", "step", **extra, **values}; `values` also go to TensorBoard as kind/name."""
        line = {"kind": kind, "step": step, **extra, **values}
        self.file.write(json.dumps(line).encode() + b"\n")
        self.file.flush()
        if self.writer is not None:
            for name, value in {**values, **extra}.items():
                self.writer.add_scalar(f"{kind}/{name}", value, step)

    def sync(self) -> int:
        """Put everything on disk; return the length of log.jsonl in bytes."""
        self.file.flush()
        os.fsync(self.file.fileno())
        if self.writer is not None:
            self.writer.flush()
        return self.file.tell()

    def start_epoch(self, epoch: int, epochs: int, samples: int, seen: int) -> None:
        """A new bar that counts `samples` quadruplets, of which `seen` are done."""
        self.end_epoch()
        self.bar = tqdm(
            total=samples, initial=seen, desc=f"epoch {epoch}/{epochs}", unit="sample", disable=not self.progress
        )

    def advance(self, samples: int, shown: Mapping[str, float] | None = None) -> None:
        assert self.bar is not None, "start_epoch comes first"
        if shown is not None:
            self.bar.set_postfix({name: f"{value:.3f}" for name, value in shown.items()}, refresh=False)
        self.bar.update(samples)

    def end_epoch(self) -> None:
        if self.bar is not None:
            self.bar.close()

    def close(self) -> None:
        self.end_epoch()
        self.sync()
        self.file.close()
        if self.writer is not None:
            self.writer.close()


class Meter:
    """Weighted means of scalars that stay on their device until someone asks, so that no step waits."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.total: Tensor | None = None
        self.weight = 0

    def add(self, values: Mapping[str, Tensor], weight: int) -> None:
        row = torch.stack([value.detach().float() for value in values.values()]) * weight
        self.names = list(values)
        self.total = row if self.total is None else self.total + row
        self.weight += weight

    def means(self) -> dict[str, float]:
        """The means so far, and start anew. Waits for the device."""
        assert self.total is not None, "nothing was added"
        values = (self.total / self.weight).tolist()
        self.total, self.weight = None, 0
        return dict(zip(self.names, values, strict=True))
