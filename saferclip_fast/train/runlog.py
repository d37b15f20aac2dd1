"""The log of a run: a JSON line per logged step, other places for the same, a progress bar."""

from __future__ import annotations

import json
import math
import os
import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from ..config import Config
from ..runtime.ranks import Ranks
from .trackers import Trackers


class RunLog:
    """Writes RUN_DIR/log.jsonl, tells the places of log.to, and shows a bar.

    A checkpoint remembers `sync()`; a resumed run cuts the file back to there, so no line is torn or doubled.
    """

    def __init__(self, run_dir: Path | None, config: Config, *, offset: int, step: int) -> None:
        """
        Args:
            run_dir: the run's folder; None: say nothing, as ranks other than the first do.
            config: log.* says what there is besides log.jsonl.
            offset: bytes of log.jsonl to keep, 0 for a new run.
            step: steps done already.
        """
        if run_dir:
            run_dir.mkdir(parents=True, exist_ok=True)
        self.file = (run_dir / "log.jsonl" if run_dir else Path(os.devnull)).open("ab")
        if run_dir:
            there = self.file.tell()
            if there < offset:
                warnings.warn(
                    f"{self.file.name} has lost lines since the checkpoint: it goes on after a gap", stacklevel=2
                )
            self.file.truncate(min(offset, there))
        self.trackers = Trackers(run_dir, config, step) if run_dir else None
        self.progress = config.log.progress and run_dir is not None
        self.bar: tqdm | None = None

    def write(self, kind: str, step: int, values: Mapping[str, float], **extra: float) -> None:
        """One line {"kind", "step", **extra, **values}; the numbers also go to the places of log.to, as kind/name."""
        line = {"kind": kind, "step": step, **extra, **values}
        self.file.write(json.dumps(line).encode() + b"\n")
        self.file.flush()
        if self.trackers:
            self.trackers.write(step, {f"{kind}/{name}": value for name, value in {**values, **extra}.items()})

    def sync(self) -> int:
        """Put everything on disk; return the length of log.jsonl in bytes."""
        self.file.flush()
        if self.file.name != os.devnull:
            os.fsync(self.file.fileno())
        if self.trackers:
            self.trackers.flush()
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
        if self.trackers:
            self.trackers.close()


class Meter:
    """Weighted means of scalars that stay on their device until someone asks, so that no step waits."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.total: Tensor | None = None  # [names + 1]: the weighted sums, and the weights' sum

    def add(self, values: Mapping[str, Tensor], weight: int, keep: Tensor | None = None) -> None:
        """Count `values` with `weight`, unless the device says that `keep` is false."""
        row = torch.stack([value.detach().float() for value in values.values()])
        row = torch.cat([row, torch.ones_like(row[:1])]) * weight
        if keep is not None:
            row = row.where(keep, 0)
        self.names = list(values)
        self.total = row if self.total is None else self.total + row

    def means(self, ranks: Ranks = Ranks()) -> dict[str, float]:  # noqa: B008 - it is immutable
        """The means so far, over all ranks, and start anew. Waits for the device."""
        assert self.total is not None, "nothing was added"
        *sums, weight = ranks.sum(self.total).tolist()
        self.total = None
        return {name: value / weight if weight else math.nan for name, value in zip(self.names, sums, strict=True)}
