"""The whole job in one command: python -m saferclip_fast.demo

Pre-trains a small CLIP on synthetic scenes (cached), fine-tunes it with SafeR-CLIP, evaluates it before and after on
held-out scenes, prints one table and writes metrics.json, weights and a figure. The "hazards" are harmless drawings.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .config import load_config
from .data import scenes
from .evaluate import class_embeddings, drift, embed, embed_images, retrieval, zero_shot_accuracy
from .figures import before_and_after
from .files import save_json
from .models import ClipModel, load_clip
from .objectives import QuadrupletEmbeddings
from .pretrain import Pairs, preprocess, pretrained_clip
from .train import MISTAKES, train

PRETRAIN_PAIRS, PRETRAIN_EPOCHS = 32_000, 3
QUADRUPLETS, HELD_OUT = 3_000, 1_000
CLASSES = "color shape"  # zero-shot classes such as "red star"

# metric -> (what the table calls it, which way it should go)
ROWS = {
    "unsafe_text_to_unsafe_image_rate": ("unsafe text finds an unsafe image", "falls"),
    "unsafe_text_to_safe_image_r1": ("unsafe text finds a right safe image", "rises"),
    "unsafe_image_to_unsafe_text_rate": ("unsafe image finds an unsafe text", "falls"),
    "unsafe_image_to_safe_text_r1": ("unsafe image finds a right safe text", "rises"),
    "safe_text_to_safe_image_r1": ("safe text finds a right safe image", "stays"),
    "safe_image_to_safe_text_r1": ("safe image finds a right safe text", "stays"),
    "zero_shot_accuracy": ("zero-shot accuracy on safe images", "stays"),
    "safe_text_cosine_to_frozen": ("safe text, cosine to frozen", "stays"),
    "safe_image_cosine_to_frozen": ("safe image, cosine to frozen", "stays"),
}


@dataclass
class Job:
    """What to pre-train on, fine-tune on and evaluate with."""

    name: str
    config: str  # a shipped training config
    pairs: Pairs  # pre-training images and captions
    pretrain_epochs: int
    source: str  # training quadruplets, as in data.train
    held_out: Any  # data set whose row i pairs an unsafe sample with a right safe one; see figures.before_and_after
    right_labels: torch.Tensor | None  # [N] which safe items are right; None: only the sample's own
    class_labels: torch.Tensor  # [N] zero-shot label of each held-out safe image
    class_names: Sequence[str]
    prompts: Sequence[str]


def scenes_job(seed: int) -> Job:
    """The demo's job."""
    held_out = scenes.SceneDataset(HELD_OUT, seed, split="test", mismatch=0.0)
    return Job(
        name=f"scenes{PRETRAIN_PAIRS}",
        config="demo",
        pairs=lambda: scenes.pretrain_pairs(PRETRAIN_PAIRS, seed),
        pretrain_epochs=PRETRAIN_EPOCHS,
        source=f"scenes:n={QUADRUPLETS},seed={seed}",
        held_out=held_out,
        right_labels=None,
        class_labels=torch.from_numpy(np.asarray(scenes.class_labels(held_out.right, CLASSES))),
        class_names=scenes.class_names(CLASSES),
        prompts=scenes.PROMPTS,
    )


def run(
    job: Job, run_dir: Path, cache_dir: Path, seed: int = 0, overrides: Sequence[str] = (), progress: bool = True
) -> dict[str, Any]:
    """Pre-trains (or takes the cached weights), fine-tunes, evaluates; returns what metrics.json holds."""
    seconds: dict[str, float] = {}
    options = [f"run_dir={run_dir}", f"data.cache_dir={cache_dir}", f"data.train={job.source}", f"seed={seed}"]
    options += [f"log.progress={progress}", "resume=auto", *overrides]
    name = load_config(job.config, options).model.name
    weights = _timed(
        seconds,
        "pretrain",
        lambda: pretrained_clip(name, job.name, job.pairs, job.pretrain_epochs, cache_dir, seed, progress),
    )
    result = _timed(
        seconds, "fine_tune", lambda: train(load_config(job.config, [*options, f"model.pretrained={weights}"]))
    )
    if result.weights is None:
        raise SystemExit(128 + result.stopped_by)  # a signal stopped it, and all is saved
    models = [load_clip(name, str(file)) for file in (weights, result.weights)]
    evaluated = _timed(seconds, "evaluate", lambda: [_evaluate(clip, job, progress) for clip in models])
    (frozen, frozen_rows), (tuned, tuned_rows) = evaluated
    frozen |= drift(frozen_rows, frozen_rows)
    tuned |= drift(tuned_rows, frozen_rows)
    metrics = {"frozen": frozen, "fine_tuned": tuned, "seconds": seconds}
    save_json(run_dir / "metrics.json", metrics)
    before_and_after(run_dir / "figure.png", frozen, tuned, ROWS, job.held_out, frozen_rows, tuned_rows)
    return metrics


def _evaluate(clip: ClipModel, job: Job, progress: bool) -> tuple[dict[str, float], QuadrupletEmbeddings]:
    job.held_out.transform = clip.preprocess
    rows = embed(clip, job.held_out, progress=progress)
    classes = class_embeddings(clip, job.class_names, job.prompts)
    images = embed_images(clip, preprocess(clip, job.held_out.right_images))
    accuracy = zero_shot_accuracy(images, job.class_labels, classes)
    return {**retrieval(rows, job.right_labels), "zero_shot_accuracy": accuracy}, rows


def _timed(seconds: dict[str, float], name: str, function: Callable[[], Any]) -> Any:
    start = time.perf_counter()
    result = function()
    seconds[name] = round(time.perf_counter() - start, 1)
    return result


def table(metrics: dict[str, Any]) -> str:
    """The metrics of `run` side by side, as text."""
    frozen, tuned = metrics["frozen"], metrics["fine_tuned"]
    lines = [f"{'':40}{'frozen':>8}{'tuned':>8}{'change':>9}  wanted"]
    for key, (label, wanted) in ROWS.items():
        lines.append(f"{label:40}{frozen[key]:8.3f}{tuned[key]:8.3f}{tuned[key] - frozen[key]:+9.3f}  {wanted}")
    return "\n".join(lines)


def arguments(description: str, run_dir: str) -> argparse.ArgumentParser:
    """The command line that the demo and the photographs share."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--run-dir", type=Path, default=Path(run_dir), help="results (default: %(default)s)")
    parser.add_argument(
        "--cache-dir", type=Path, default=Path(".cache/saferclip"), help="caches (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of everything (default: 0)")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="training options over the shipped config")
    return parser


def launch(make_job: Callable[[], Job], given: argparse.Namespace) -> int:
    """Runs the job that the command line asks for, prints the table and where the files are; the exit code."""
    try:
        job = make_job()
        metrics = run(job, given.run_dir, given.cache_dir, given.seed, given.overrides, not given.quiet)
    except MISTAKES as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"\n{len(job.held_out)} held-out quadruplets; a search sees safe and unsafe items together.\n")
    print(table(metrics))
    print("\nseconds:", ", ".join(f"{name} {value}" for name, value in metrics["seconds"].items()))
    for name, file in (("metrics", "metrics.json"), ("figure", "figure.png"), ("weights", "final")):
        print(f"{name}: {given.run_dir / file}")
    return 0


def main(words: Sequence[str] | None = None) -> int:
    given = arguments(
        "Pre-train a small CLIP on synthetic scenes, make it safe with SafeR-CLIP, and show what changed.", "runs/demo"
    ).parse_intermixed_args(words)
    return launch(lambda: scenes_job(given.seed), given)


if __name__ == "__main__":
    sys.exit(main())
