"""The whole job in one command: python -m saferclip_fast.demo

Pre-trains a small CLIP on synthetic scenes (cached), fine-tunes it with SafeR-CLIP@K (the default objective) and, to
compare, with Safe-CLIP at its best setting, evaluates all three on held-out scenes, prints one table and writes
evaluations, weights, a figure and a report. The "hazards" are harmless drawings.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..cli import run_command

if TYPE_CHECKING:
    from .job import Job


def arguments(description: str, run_dir: str, prog: str | None = None) -> argparse.ArgumentParser:
    """The command line that the demo and the photographs share."""
    parser = argparse.ArgumentParser(prog=prog, description=description)
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
    return run_command(lambda: _run(make_job(), given))


def _run(job: Job, given: argparse.Namespace) -> int:
    from ..evaluate import comparison
    from .job import BASELINE, BASELINE_FOLDER, run

    result = run(job, given.run_dir, given.cache_dir, given.seed, given.overrides, not given.quiet)
    print(
        f"\n{len(job.held_out)} held-out quadruplets; 95 % intervals; a search sees safe and unsafe items together.\n"
    )
    print(comparison(result["evaluations"]))
    print("\nseconds:", ", ".join(f"{name} {value}" for name, value in result["seconds"].items()))
    for name, file in (
        ("weights", "final"),
        ("figure", "figure.png"),
        ("evaluation", "evaluation.json"),
        (BASELINE, BASELINE_FOLDER),
        ("report", "report.html"),
    ):
        print(f"{name}: {given.run_dir / file}")
    return 0


def main(words: Sequence[str] | None = None, prog: str = "python -m saferclip_fast.demo") -> int:
    """Command line; returns the exit code of `launch`."""
    given = arguments(
        "Pre-train a small CLIP on synthetic scenes, make it safe with SafeR-CLIP, and show what changed, "
        "beside Safe-CLIP.",
        "runs/demo",
        prog,
    ).parse_intermixed_args(words)

    def make_job() -> Job:
        from .job import scenes_job

        return scenes_job(given.seed)

    return launch(make_job, given)


if __name__ == "__main__":
    sys.exit(main())
