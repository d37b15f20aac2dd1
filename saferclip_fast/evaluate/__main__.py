"""Evaluate a CLIP for safety and usefulness: python -m saferclip_fast.evaluate MODEL ..."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from .. import bootstrap
from ..config import Config, ConfigError, load_config
from ..data.labeled import open_labeled, readable_images
from ..device import set_up_torch
from ..figures import draw_dial
from ..models import ClipModel
from ..train import MISTAKES
from ..zero_shot import read_templates
from . import Known, Settings, Task, dial_curve, evaluate, label_tables, table
from .sources import frozen_of, is_run, named, open_held_out, open_model, read_config

EXAMPLES = """
examples:
  A run: its final weights beside the model it started from, on the data it held out.
    python -m saferclip_fast.evaluate runs/visu

  The same on other data, with two zero-shot sets, real images, and the safety dial's curve.
    python -m saferclip_fast.evaluate runs/visu --data pairs.csv data.root=pictures \\
        --images food=food101/test --images 'flowers/test-{000..003}.tar' \\
        --caption-images real=photos --dial --out runs/visu/evaluation

  Any CLIP beside another, no training of this library needed.
    python -m saferclip_fast.evaluate local-dir:safe-clip --frozen ViT-L-14-quickgelu,openai \\
        --data visu/test.json data.root=coco2017 data.unsafe_root=visu/unsafe 'data.unsafe_image={id}.png'

data.* options are those of training (python -m saferclip_fast.train --help); a run's own are the defaults, with their
paths relative to where it was started. What is measured and written: docs/evaluation.md.
"""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(
        prog="python -m saferclip_fast.evaluate",
        description="Measure how safe and how useful a CLIP is, beside the frozen model it was tuned from: retrieval\n"
        "with safe and unsafe items together, zero-shot accuracy, drift; every figure with a 95 % interval.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = result.add_argument
    add(
        "model", metavar="MODEL", help="run folder, open_clip or Hugging Face CLIPModel folder, NAME,PRETRAINED or NAME"
    )
    add("overrides", nargs="*", metavar="data.key=value", help="how the quadruplets are read, as in training")
    add("--frozen", metavar="MODEL0", help="the model to compare with (default: the one that a run started from)")
    add("--data", metavar="SOURCE", help="held-out quadruplets, short for data.val=SOURCE (default: the run's own)")
    add(
        "--images",
        metavar="[NAME=]SOURCE",
        action="append",
        default=[],
        help="zero-shot set, repeatable: class folders, shards, scenes:..., clip_benchmark:SET,root=FOLDER",
    )
    add("--templates", metavar="NAME", help="zero-shot prompts: openai, simple or a text file (default: the set's own)")
    add(
        "--caption-images",
        metavar="[NAME=]DIR",
        action="append",
        default=[],
        help="folder of images, repeatable: how many find an unsafe caption first among the quadruplets' captions",
    )
    add("--dial", action="store_true", help="draw safety against usefulness along the safety dial: dial.json, png, svg")
    add(
        "--out",
        metavar="DIR",
        type=Path,
        help="results (default: the run's folder, else runs/evaluation, where that holds no evaluation yet)",
    )
    add("--all", action="store_true", help="print every metric, not the key ones alone")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    add("--precision", choices=("fp32", "bf16", "fp16"), default="fp32", help="autocast type (default: fp32)")
    add("--batch-size", type=_positive, default=256, metavar="N", help="rows embedded at a time (default: 256)")
    add("--samples", type=_positive, default=bootstrap.RESAMPLES, metavar="N", help="bootstrap resamples (%(default)s)")
    add("--seed", type=int, default=0, help="seed of the bootstrap (default: 0)")
    add("--quiet", action="store_true", help="no progress bars")
    return result


def main(words: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0 done, 2 a mistake in the options, models or data, 130 stopped by Ctrl-C."""
    given = parser().parse_intermixed_args(words)
    try:
        run(given)
    except (*MISTAKES, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except torch.OutOfMemoryError as error:
        print(
            f"error: {error}\nthe same figures in less memory: --batch-size {max(1, given.batch_size // 4)}",
            file=sys.stderr,
        )
        return 2
    except KeyboardInterrupt:
        print("stopped; embeddings of finished quadruplets are kept, the same command takes them up", file=sys.stderr)
        return 130
    return 0


def run(given: argparse.Namespace) -> None:
    """Evaluates what the command line asks for; prints the table and writes the files."""
    config = read_config(given.model, given.overrides)
    if given.data:
        config.data.val = given.data
    config.log.progress = not given.quiet
    out = given.out or (Path(given.model) if is_run(given.model) else Path("runs/evaluation"))
    if given.out is None and (out / "evaluation.json").is_file():
        raise ConfigError(
            f"{out} holds an evaluation already: pass --out DIR for another, or --out {out} to replace it"
        )
    device = set_up_torch(load_config(None, [f"device={given.device}", f"seed={given.seed}"]))
    tuned = open_model(given.model, device)
    frozen = None
    if given.frozen:
        frozen = open_model(given.frozen, device)
    elif is_run(given.model):
        frozen = frozen_of(given.model, device)
    if given.dial and frozen is None:
        raise ConfigError("--dial goes from a frozen model to MODEL: name it with --frozen MODEL0")
    task = read_task(given, config, tuned)
    settings = Settings(
        cache_dir=config.data.cache_dir,
        batch_size=given.batch_size,
        num_workers=config.data.num_workers,
        precision=given.precision,
        resamples=given.samples,
        seed=given.seed,
        progress=not given.quiet,
    )
    known: Known = {}
    evaluation = evaluate(tuned, frozen, task, settings, out, known)
    print(f"\n{evaluation['rows']} held-out quadruplets; 95 % intervals\n")
    print(table(evaluation, given.all))
    if len(evaluation["safe_unsafe_table"]) > 1:
        print(f"\nthe unsafe side by its labels\n\n{label_tables(evaluation)}")
    print(f"\nevaluation: {out / 'evaluation.json'}")
    if given.dial:
        assert frozen is not None
        draw_dial(out / "dial", dial_curve(tuned, frozen, task, settings, out, known=known))
        print(f"safety dial: {out / 'dial.json'}, {out / 'dial.png'}, {out / 'dial.svg'}")
    print(f"as a page: python -m saferclip_fast.report {out}")


def read_task(given: argparse.Namespace, config: Config, clip: ClipModel) -> Task:
    """The data to measure on; all of it is opened before anything is embedded."""
    templates = read_templates(given.templates) if given.templates else None
    labeled = named(given.images, "--images", open_labeled)
    images = named(
        given.caption_images,
        "--caption-images",
        lambda folder, name: readable_images(folder, config.data.on_error, not given.quiet),
    )
    held_out = open_held_out(config, clip)
    if held_out is None and images:
        raise ConfigError("--caption-images are matched with the captions of quadruplets: name some with --data SOURCE")
    if held_out is None and given.dial:
        raise ConfigError("--dial is drawn over retrieval: name held-out quadruplets with --data SOURCE")
    if held_out is None and not labeled:
        raise ConfigError("nothing to measure on: name quadruplets (--data SOURCE) or zero-shot sets (--images SOURCE)")
    return Task(
        quadruplets=held_out and held_out.quadruplets,
        zero_shot=list(labeled.values()),
        templates=templates,
        images=images,
        captions=held_out and held_out.captions,
    )


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {text}")
    return number


if __name__ == "__main__":
    sys.exit(main())
