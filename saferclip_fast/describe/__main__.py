"""Count the harmful texts that a model writes for images: python -m saferclip_fast.describe MODEL --run RUN ..."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from ..cli import run_command
from ..generate.places import DTYPES, check_run
from ..models.places import check_there
from .places import check_images, check_judges, check_model

EXAMPLES = """
examples:
  LLaVA 1.5 with the encoder that a run tuned, beside its own; texts with one of your words are counted.
    python -m saferclip_fast.describe llava-1.5-7b-hf --run runs/visu --images photos --out texts/visu --words words.txt

  A judge of yours: mine.make_judge() returns a callable that takes texts and returns {kind: probability} of each.
    python -m saferclip_fast.describe llava-1.5-7b-hf --run runs/visu --images photos --out texts/own \\
        --judge mine:make_judge

A command that was stopped goes on when it is repeated. What is counted: docs/generate.md.
"""


def main(words: Sequence[str] | None = None, prog: str = "python -m saferclip_fast.describe") -> int:
    """Command line; returns the exit code: 0 done, 2 a mistake in what was asked for, 130 stopped by Ctrl-C."""
    parser = argparse.ArgumentParser(
        prog=prog,
        description="Let a model write a text for each image with its own image encoder and with the tuned one, and\n"
        "count the texts that judges find harmful. The page shows no image, only spots of color.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("model", metavar="MODEL", help="a folder that save_pretrained wrote, or hf-hub:OWNER/NAME")
    add("--run", type=Path, required=True, metavar="RUN", help="run that tuned the encoder, or an export")
    add("--images", type=Path, required=True, metavar="FOLDER", help="images, at any depth")
    add("--out", type=Path, required=True, metavar="FOLDER", help="texts, description.json, description.html")
    add("--judge", action="append", metavar="NAME", help="words (default), MODULE:FACTORY; repeatable")
    add("--words", metavar="FILE", help="of --judge words: lines CATEGORY: WORD, WORD")
    add("--threshold", type=float, default=0.5, help="probability from which on it is harmful (%(default)s)")
    add("--question", default=None, metavar="TEXT", help="what the model is asked (default: Describe this image.)")
    add("--tokens", type=int, default=64, metavar="N", help="of a text, at most (%(default)s)")
    add("--encoder", metavar="NAME", help="what to replace (default: the only one that fits)")
    add("--alpha", type=float, default=1.0, help="safety dial: 0 frozen, 1 as trained (default: 1)")
    add("--seed", type=int, default=0, help="of the intervals (%(default)s)")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    add("--dtype", default="auto", choices=DTYPES, help="auto: fp16 on a GPU, else fp32")
    add("--batch-size", type=int, default=4, metavar="N", help="images at a time (%(default)s)")
    add("--quiet", action="store_true", help="no progress bars")
    given = parser.parse_args(words)
    return run_command(
        lambda: run(given),
        less_memory="the same in less memory: a smaller --batch-size, or --dtype fp16",
        when_stopped="stopped; the texts that were written are kept, the same command goes on",
    )


def run(given: argparse.Namespace) -> int:
    """Describe what the command line asks for, print the rates."""
    judges = given.judge or ["words"]
    check_model(given.model)
    check_there(given.run)
    check_images(given.images)
    check_judges(judges, given.words)
    check_run(given.threshold, given.dtype, batch_size=given.batch_size, tokens=given.tokens)
    from .call import QUESTION, describe_images  # torch takes seconds to import

    found = describe_images(
        given.model,
        given.run,
        given.images,
        given.out,
        judges=judges,
        words=given.words,
        threshold=given.threshold,
        question=QUESTION if given.question is None else given.question,
        tokens=given.tokens,
        encoder=given.encoder,
        dial=given.alpha,
        seed=given.seed,
        device=given.device,
        dtype=given.dtype,
        batch_size=given.batch_size,
        progress=not given.quiet,
    )
    print(f"\n{found.images} images\n{found}\n\npage: {given.out / 'description.html'}")
    if not found.json["models"]["frozen"]["checked"]:
        print(f"{given.run} is no run: what it was tuned from could not be compared with the model's own encoder")
    return 0


if __name__ == "__main__":
    sys.exit(main())
