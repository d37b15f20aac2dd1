"""Fit P(unsafe) of texts and images on a run's data: python -m saferclip_fast.guard RUN"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from ..cli import run_command
from ..data.places import check_place
from .place import check_run

EXAMPLES = """
examples:
  A run: fitted on its training rows, calibrated on one half of what it held out, reported on the other half.
    python -m saferclip_fast.guard runs/visu

  The same, reported on other data; all of the held-out rows calibrate.
    python -m saferclip_fast.guard runs/visu --data pairs.csv data.root=pictures

How to use what it writes, and what its probabilities mean: docs/guard.md.
"""


def main(words: Sequence[str] | None = None, prog: str = "python -m saferclip_fast.guard") -> int:
    """Command line; returns the exit code: 0 done, 2 a mistake in the options, the run or the data, 130 Ctrl-C."""
    parser = argparse.ArgumentParser(
        prog=prog,
        description="Fit a small guard on the frozen model's embeddings: the probability that a text or an image is\n"
        "unsafe. Writes guard.safetensors and guard.json into the run's folder; a guard that is there is replaced.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("run", type=Path, metavar="RUN", help="folder of a run; its frozen model and its data are used")
    add("options", nargs="*", metavar="data.key=value", help="how the quadruplets are read, as in training")
    add("--data", metavar="SOURCE", help="quadruplets to report on (default: one half of what the run held out)")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    add("--batch-size", type=int, default=256, metavar="N", help="rows embedded at a time (default: 256)")
    add("--seed", type=int, default=0, help="of the fit and the bootstrap (default: 0)")
    add("--quiet", action="store_true", help="no progress bars")
    given = parser.parse_intermixed_args(words)
    return run_command(lambda: run(given), less_memory="the same in less memory: a smaller --batch-size")


def run(given: argparse.Namespace) -> int:
    """Fit what the command line asks for; returns the exit code."""
    check_run(given.run)
    if given.data and not given.data.endswith(".json"):  # whose root is an option, which a run may have
        check_place(given.data)
    if given.batch_size < 1:
        raise ValueError(f"--batch-size must be at least 1, not {given.batch_size}")
    from .call import fit_guard  # torch and open_clip take seconds to import, and --help needs none of them
    from .tables import table

    found = fit_guard(
        given.run,
        given.data,
        options=given.options,
        device=given.device,
        batch_size=given.batch_size,
        seed=given.seed,
        progress=not given.quiet,
    )
    print(f"\n{table(found.figures)}\n\nguard: {given.run / 'guard.safetensors'}, {given.run / 'guard.json'}")
    print("as a page, once the run is evaluated: python -m saferclip_fast.report " + str(given.run))
    return 0


if __name__ == "__main__":
    sys.exit(main())
