"""Evaluate a CLIP for safety and usefulness: python -m saferclip_fast.evaluate MODEL ..."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..cli import run_command
from ..config import ConfigError
from .bootstrap import CONFIDENCE, RESAMPLES
from .places import check_bound, check_words
from .published import check_left, listing, missing_of, read_table_data, table_named, tables

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

  The figures of a paper's table beside this model's, on your own copies of its data: tables.yaml has lines visu: PATH.
    python -m saferclip_fast.evaluate runs/visu --table safer-clip --table-data tables.yaml

data.* options are those of training (python -m saferclip_fast.train --help); a run's own are the defaults, with their
paths relative to where it was started. What is measured and written: docs/evaluation.md.
"""


def parser(prog: str) -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(
        prog=prog,
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
        "--max-loss",
        type=float,
        metavar="L",
        help="with --dial and --images: the largest dial that loses at most L of accuracy (0.02: 2 points)",
    )
    add("--confidence", type=float, default=CONFIDENCE, metavar="C", help="how sure --max-loss is (%(default)s)")
    add(
        "--table",
        metavar="NAME",
        action=_Table,
        help=f"a published table beside this model's figures: {', '.join(tables())}; list: what each needs",
    )
    add("--table-data", metavar="FILE", type=Path, help="where the table's data sets lie: YAML, a line SET: PATH each")
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
    add("--samples", type=_positive, default=RESAMPLES, metavar="N", help="bootstrap resamples (%(default)s)")
    add("--seed", type=int, default=0, help="seed of the bootstrap (default: 0)")
    add("--quiet", action="store_true", help="no progress bars")
    return result


def main(words: Sequence[str] | None = None, prog: str = "python -m saferclip_fast.evaluate") -> int:
    """Returns the exit code: 0 done, 2 a mistake in the options, models or data, 130 stopped by Ctrl-C."""
    given = parser(prog).parse_intermixed_args(words)

    def command() -> int:
        check_bound(given.dial, given.max_loss, given.confidence, given.images)
        _check_table(given)
        check_words(given.model, given.frozen, given.data, given.images, given.caption_images)
        from .command import run  # torch and open_clip take seconds to import, and --help needs none of them

        run(given)
        return 0

    return run_command(
        command,
        less_memory=f"the same figures in less memory: --batch-size {max(1, given.batch_size // 4)}",
        when_stopped="stopped; embeddings of finished quadruplets are kept, the same command takes them up",
    )


class _Table(argparse.Action):
    """--table list prints the tables and ends, as --help does."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, *_: Any) -> None:
        if values == "list":
            print(listing())
            parser.exit()
        setattr(namespace, self.dest, values)


def _check_table(given: argparse.Namespace) -> None:
    """Raises ConfigError for a table that is none, whose data is missing, or what does not go with one."""
    if given.table is None:
        if given.table_data:
            raise ConfigError(f"--table-data belongs to --table NAME: {', '.join(tables())}")
        return
    table, others = table_named(given.table), ("data", "images", "templates", "caption_images", "dial", "all")
    if taken := [name for name in others if getattr(given, name)]:
        flag = taken[0].replace("_", "-")
        raise ConfigError(f"--table measures on what --table-data names, by the paper's rules: leave out --{flag}")
    check_left(table, missing_of(table, read_table_data(given.table_data)))


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {text}")
    return number


if __name__ == "__main__":
    sys.exit(main())
