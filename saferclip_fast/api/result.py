"""What fine_tune returns."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from ..models import ClipModel
from ..train import Progress


@dataclass(frozen=True, repr=False)
class FineTuned(os.PathLike[str]):
    """A finished run: its model and its folder. It stands for the folder wherever one is taken: `sf.evaluate(tuned)`.

    Attributes:
        model: the tuned model, adapters merged, in evaluation mode. `encode_image` takes images [B, 3, H, W] and
            `encode_text` tokens [N, L]; both give embeddings [B or N, d] float32, not normalized.
        run_dir: the run's folder: config.yaml, log.jsonl, checkpoints/, final/.
        metrics: of the weights that were exported: `step`, and the means that their validation gave, `val.loss` and
            `val.recall` among them; without a validation the last logged means of training, `train.loss` among them.
    """

    model: ClipModel
    run_dir: Path
    metrics: Mapping[str, float]

    @property
    def preprocess(self) -> Callable:
        """RGB PIL image -> float32 tensor [3, H, W]."""
        return self.model.preprocess

    @property
    def tokenizer(self) -> Callable:
        """List of N texts -> int64 tokens [N, L]."""
        return self.model.tokenizer

    def __repr__(self) -> str:
        return f"FineTuned({self.model.name} in {str(self.run_dir)!r}, step {self.metrics['step']:g})"

    def __fspath__(self) -> str:
        return str(self.run_dir)


def metrics_of(run_dir: Path, progress: Progress, best: bool) -> dict[str, float]:
    """The figures of the weights in final/, from the run's log: those of the `best` validation, or the last ones."""
    lines = [json.loads(line) for line in (run_dir / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    step = progress.best_step if best and progress.best_score is not None else progress.step
    found = [x for x in lines if x["kind"] == "val" and x["step"] == step] or [x for x in lines if x["kind"] == "train"]
    about = ("kind", "step", "epoch", "lr", "samples_per_second")
    last = found[-1] if found else {}
    return {"step": step} | {f"{last['kind']}.{name}": x for name, x in last.items() if name not in about}
