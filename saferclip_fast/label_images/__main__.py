"""Label a table's unsafe images by a safety classifier: python -m saferclip_fast.label_images TABLE --out NEW"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from ..cli import run_command
from .classifiers import THRESHOLD

EXAMPLES = """
examples:
  A table, by NudeNet's detector.
    python -m saferclip_fast.label_images pairs.csv --out labeled.csv --root pictures

  ViSU with images of yours, by a classifier of yours: mine.make_classifier() returns a function that takes RGB images
  and returns the probability that each is unsafe.
    python -m saferclip_fast.label_images visu/test.json --out visu/test-labeled.json \\
        --root visu/unsafe --unsafe-image '{id}.png' --classifier mine:make_classifier
"""


def main(words: Sequence[str] | None = None, prog: str = "python -m saferclip_fast.label_images") -> int:
    """Returns the exit code: 0 done, 2 a mistake in the options or the table, 130 stopped by Ctrl-C."""
    parser = argparse.ArgumentParser(
        prog=prog,
        description="Label the unsafe images of a table of quadruplets (CSV, TSV, JSON Lines, JSON of ViSU or\n"
        "NSFWCaps) by an image safety classifier: generated images are not always unsafe, and training and\n"
        "evaluation read the labels.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("table", metavar="TABLE", help="as data.train takes it")
    add("--out", required=True, metavar="NEW", help="the new table, of the same format")
    add("--classifier", default="nudenet", metavar="NAME", help="nudenet, or MODULE:FACTORY (default: nudenet)")
    add("--root", help="folder of the unsafe images (default: the table's)")
    add("--unsafe-image", metavar="NAME", help="their name where an entry of a .json has none, e.g. {id}.png")
    add("--column", action="append", default=[], metavar="FIELD=NAME", help="a column's name, e.g. unsafe_image=file")
    add("--threshold", type=float, default=THRESHOLD, help="probability from which on an image is unsafe (%(default)s)")
    add("--allow-absolute", action="store_true", help="admit absolute image paths")
    add("--quiet", action="store_true", help="no progress bar")
    given = parser.parse_args(words)
    return run_command(
        lambda: run(given), when_stopped="stopped; what was classified is kept, the same command goes on"
    )


def run(given: argparse.Namespace) -> int:
    """Label what the command line names; returns the exit code."""
    table = Path(given.table)
    if table.suffix.lower() != ".parquet" and not table.is_file():  # before torch, which takes seconds to import
        raise FileNotFoundError(f"cannot read {given.table}: there is no such file")
    from . import label_table, open_classifier

    counts = label_table(
        given.table,
        given.out,
        open_classifier(given.classifier),
        root=given.root,
        columns=dict(word.split("=", 1) if "=" in word else (word, "") for word in given.column),
        unsafe_image=given.unsafe_image,
        allow_absolute=given.allow_absolute,
        threshold=given.threshold,
        progress=not given.quiet,
    )
    print(f"{counts}; written to {given.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
