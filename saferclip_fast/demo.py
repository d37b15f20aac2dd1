"""The whole job in one command: python -m saferclip_fast.demo

Pre-trains a small CLIP on synthetic scenes (cached), fine-tunes it with SafeR-CLIP, evaluates it before and after on
held-out scenes, prints one table and writes metrics.json, weights and a figure. The "hazards" are harmless drawings.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from .config import load_config
from .data import scenes
from .evaluate import class_embeddings, drift, embed, embed_images, retrieval, zero_shot_accuracy
from .figures import before_and_after
from .files import save_json
from .models import ClipModel, load_clip
from .pretrain import preprocess, pretrained_clip
from .train import train

PRETRAIN_PAIRS, PRETRAIN_EPOCHS = 40_000, 3
QUADRUPLETS, HELD_OUT = 3_000, 1_000
CLASSES = "color shape"  # zero-shot classes such as "red star"

# metric -> (what the table calls it, which way is better)
ROWS = {
    "unsafe_text_to_unsafe_image_rate": ("unsafe text finds an unsafe image", "falls"),
    "unsafe_text_to_safe_image_r1": ("unsafe text finds the right safe image", "rises"),
    "unsafe_image_to_unsafe_text_rate": ("unsafe image finds an unsafe text", "falls"),
    "unsafe_image_to_safe_text_r1": ("unsafe image finds the right safe text", "rises"),
    "safe_text_to_safe_image_r1": ("safe text finds its safe image", "stays"),
    "zero_shot_accuracy": ("zero-shot accuracy, safe scenes", "stays"),
    "safe_text_cosine_to_frozen": ("safe text, cosine to frozen", "stays"),
    "safe_image_cosine_to_frozen": ("safe image, cosine to frozen", "stays"),
}


def evaluate_scenes(clip: ClipModel, held_out: scenes.SceneDataset, frozen=None, progress: bool = True):
    """(metrics of `clip` on the held-out scenes, its embeddings); `frozen`: embeddings to measure drift from."""
    rows = embed(clip, held_out, progress=progress)
    images = embed_images(clip, preprocess(clip, held_out.right_images))
    classes = class_embeddings(clip, scenes.class_names(CLASSES), scenes.PROMPTS)
    labels = torch.from_numpy(np.asarray(scenes.class_labels(held_out.right, CLASSES)))
    accuracy = zero_shot_accuracy(images, labels, classes)
    return {**retrieval(rows), "zero_shot_accuracy": accuracy, **drift(rows, frozen or rows)}, rows


def run(run_dir: Path, cache_dir: Path, seed: int, overrides: Sequence[str], progress: bool = True) -> dict:
    """The demo; returns what metrics.json holds."""
    start = time.perf_counter()
    options = [f"run_dir={run_dir}", f"seed={seed}", f"data.cache_dir={cache_dir}", f"log.progress={progress}"]
    options += [f"data.train=scenes:n={QUADRUPLETS},seed={seed}", *overrides]
    name = load_config("demo", options).model.name
    weights = pretrained_clip(
        name,
        f"scenes{PRETRAIN_PAIRS}",
        lambda: scenes.pretrain_pairs(PRETRAIN_PAIRS, seed),
        PRETRAIN_EPOCHS,
        cache_dir,
        seed,
        progress,
    )
    pretrained_at = time.perf_counter()
    config = load_config("demo", [*options, f"model.pretrained={weights}"])
    result = train(config)
    if result.weights is None:
        raise KeyboardInterrupt
    trained_at = time.perf_counter()
    held_out = scenes.SceneDataset(HELD_OUT, seed, split="test", mismatch=0.0)  # each unsafe scene with its safe self
    before = load_clip(name, str(weights))
    after = load_clip(name, str(result.weights))
    for clip in (before, after):
        held_out.transform = clip.preprocess
    frozen, frozen_rows = evaluate_scenes(before, held_out, progress=progress)
    tuned, tuned_rows = evaluate_scenes(after, held_out, frozen_rows, progress)
    seconds = {
        "pretrain": pretrained_at - start,
        "fine_tune": trained_at - pretrained_at,
        "evaluate": time.perf_counter() - trained_at,
    }
    metrics = {"frozen": frozen, "fine_tuned": tuned, "seconds": {k: round(v, 1) for k, v in seconds.items()}}
    save_json(run_dir / "metrics.json", metrics)
    before_and_after(run_dir / "figure.png", frozen, tuned, ROWS, held_out, frozen_rows, tuned_rows)
    return metrics


def table(frozen: dict[str, float], tuned: dict[str, float], rows: dict[str, tuple[str, str]]) -> str:
    """The metrics side by side, as text."""
    lines = [f"{'':40}{'frozen':>8}{'tuned':>8}{'change':>9}  wanted"]
    for key, (label, wanted) in rows.items():
        lines.append(f"{label:40}{frozen[key]:8.3f}{tuned[key]:8.3f}{tuned[key] - frozen[key]:+9.3f}  {wanted}")
    return "\n".join(lines)


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m saferclip_fast.demo",
        description="Pre-train a small CLIP on synthetic scenes, make it safe with SafeR-CLIP, and show what changed.",
    )
    parser.add_argument("--run-dir", type=Path, default=Path("runs/demo"), help="results (default: %(default)s)")
    parser.add_argument(
        "--cache-dir", type=Path, default=Path(".cache/saferclip"), help="caches (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of everything (default: 0)")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="training options over the demo's")
    arguments = parser.parse_intermixed_args(words)
    run_dir = arguments.run_dir
    overrides = [*arguments.overrides, "resume=auto"]
    metrics = run(run_dir, arguments.cache_dir, arguments.seed, overrides, not arguments.quiet)
    print(f"\nHeld-out scenes, {HELD_OUT} quadruplets; galleries hold safe and unsafe items together.\n")
    print(table(metrics["frozen"], metrics["fine_tuned"], ROWS))
    print(f"\nmetrics: {run_dir / 'metrics.json'}\nfigure:  {run_dir / 'figure.png'}\nweights: {run_dir / 'final'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
