"""Teach a safe model a new kind of unsafe content: python -m saferclip_fast.patch RUN --pairs SOURCE --out DIR"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from ..cli import run_command
from .places import MAX_LOSS, Recipe, check_out, check_pairs, check_recipe, check_run

EXAMPLES = """
examples:
  The model of runs/visu lets a new kind of unsafe content through; new.csv holds 16 pairs of it.
    python -m saferclip_fast.patch runs/visu --pairs new.csv --out visu-patched

  The run's training data has moved.
    python -m saferclip_fast.patch runs/visu --pairs new.csv --out visu-patched --replay other/place.csv

The run's training goes on for some steps with the pairs among its own quadruplets, and only as much of the change is
kept as makes those worse by at most --max-loss. docs/patch.md says more.
"""


def main(words: Sequence[str] | None = None, prog: str = "python -m saferclip_fast.patch") -> int:
    """Command line; returns the exit code: 0 done, 2 a mistake in what was asked for, 130 stopped by Ctrl-C."""
    parser = argparse.ArgumentParser(
        prog=prog,
        description="Experimental: teach a safe model a new kind of unsafe content from 1 to 32 pairs, in seconds.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("run", metavar="RUN", help="the run that made the model safe")
    add("overrides", nargs="*", metavar="key=value", help="data.*: how the pairs are read; objective.*: the loss")
    add("--pairs", required=True, metavar="SOURCE", help="quadruplets of the new kind, in any format of training")
    add("--out", type=Path, required=True, metavar="DIR", help="new folder: weights, patch.json and energy.png")
    add("--replay", metavar="SOURCE", help="quadruplets to go over again (default: those that the run was trained on)")
    add("--steps", type=int, default=Recipe.steps, help="steps (%(default)s)")
    add("--lr", type=float, default=Recipe.lr, help="peak of the learning rate (%(default)s)")
    add("--rank", type=int, default=Recipe.rank, help="rank of the change (%(default)s)")
    add(
        "--max-loss",
        type=float,
        default=MAX_LOSS,
        help="by how much what is replayed may get worse, in unsafe rate and in safe retrieval (%(default)s)",
    )
    add("--device", default="auto", help="cpu, cuda, ... (auto)")
    add("--batch-size", type=int, default=256, help="quadruplets embedded at a time (%(default)s)")
    add("--seed", type=int, default=0, help="of the adapters and the batches (%(default)s)")
    add("--quiet", action="store_true", help="no progress bars")
    given = parser.parse_intermixed_args(words)
    return run_command(lambda: run(given), less_memory="try a smaller --batch-size")


def run(given: argparse.Namespace) -> int:
    """Patches what the command line asks for, prints the figures."""
    check_recipe(given.steps, given.lr, given.rank, given.max_loss)
    check_run(given.run)
    check_pairs(given.pairs)
    check_out(given.out)
    from .call import patch_model  # torch takes seconds to import

    found = patch_model(
        given.run,
        given.pairs,
        given.out,
        replay=given.replay,
        steps=given.steps,
        lr=given.lr,
        rank=given.rank,
        max_loss=given.max_loss,
        options=given.overrides,
        device=given.device,
        batch_size=given.batch_size,
        seed=given.seed,
        progress=not given.quiet,
    )
    print(f"\n{found}\n\nweights for open_clip, patch.json, energy.png: {given.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
