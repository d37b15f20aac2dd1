"""Put back the safety that a later fine-tuning took: python -m saferclip_fast.restore RUN LATER --out DIR"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from ..cli import run_command
from ..evaluate.places import check_words
from .places import TAKE_BACK, THRESHOLD, check_out, check_shares

EXAMPLES = """
examples:
  The safe model of runs/visu was fine-tuned on own data (mine/, an open_clip folder) and finds unsafe items again.
    python -m saferclip_fast.restore runs/visu mine --out mine-restored --images food=food101/test

  A fixed part of the safe change in place of the smallest that is enough; every layer.
    python -m saferclip_fast.restore runs/visu mine --out mine-restored --add 0.5 --threshold 1.1

No training: where the later change left the directions that made the model safe, that change is added once more, as
little of it as is enough. docs/related.md says more.
"""


def main(words: Sequence[str] | None = None, prog: str = "python -m saferclip_fast.restore") -> int:
    """Command line; returns the exit code: 0 done, 2 a mistake in what was asked for, 130 stopped by Ctrl-C."""
    parser = argparse.ArgumentParser(
        prog=prog,
        description="Put back the safety that a later fine-tuning took from a safe model, without training.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("run", metavar="RUN", help="the run that made the model safe")
    add("later", metavar="LATER", help="the model after the later fine-tuning: a folder or NAME,FILE")
    add("overrides", nargs="*", metavar="data.key=value", help="how the quadruplets are read, as in training")
    add("--out", type=Path, required=True, metavar="DIR", help="new folder: weights, restore.json and layers.png")
    add("--data", metavar="SOURCE", help="held-out quadruplets (default: the run's own)")
    add(
        "--images",
        metavar="[NAME=]SOURCE",
        action="append",
        default=[],
        help="zero-shot set of what the later fine-tuning was for, repeatable: shows what is kept of it",
    )
    add("--threshold", type=float, default=THRESHOLD, help="layers with a smaller rho are changed (%(default)s)")
    add("--add", type=float, help="how much of the safe change is added (default: the least that is enough, up to 1)")
    add(
        "--take-back",
        type=float,
        default=TAKE_BACK,
        help="the part of the rise of the unsafe rate that is enough to take back (%(default)s)",
    )
    add("--device", default="auto", help="cpu, cuda, ... (auto)")
    add("--batch-size", type=int, default=256, help="images or captions at a time (%(default)s)")
    add("--quiet", action="store_true", help="no progress bars")
    given = parser.parse_intermixed_args(words)
    return run_command(lambda: run(given), less_memory="try a smaller --batch-size")


def run(given: argparse.Namespace) -> int:
    """Restores what the command line asks for, prints the figures and the layers."""
    check_words(given.run, given.later, given.data, given.images, ())
    check_shares(given.threshold, given.add, given.take_back)
    check_out(given.out)
    from .call import restore_model  # torch takes seconds to import

    found = restore_model(
        given.run,
        given.later,
        given.out,
        given.data,
        images=given.images,
        threshold=given.threshold,
        add=given.add,
        take_back=given.take_back,
        options=given.overrides,
        device=given.device,
        batch_size=given.batch_size,
        progress=not given.quiet,
    )
    print(f"\n{found}\n\n{'rho':>6}  weight")
    for layer in found.layers:
        print(f"{layer.rho:6.3f}  {layer.name}{', safe change added' if layer.changed else ''}")
    print(f"\nweights for open_clip, restore.json, layers.png: {given.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
