"""Measure every op's backends on this machine and keep what is fastest: python -m saferclip_fast.tune"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from ..cli import run_command


def main(words: Sequence[str] | None = None, prog: str = "python -m saferclip_fast.tune") -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog=prog,
        description="Time every op's backends on this machine and write which one to take at which size.",
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where torch sees a GPU, else cpu")
    parser.add_argument("--seconds", type=float, default=0.2, help="time spent on each measurement (default: 0.2)")
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help="the table to write (default: the one that is read)"
    )
    given = parser.parse_args(words)
    return run_command(lambda: run(given))


def run(given: argparse.Namespace) -> int:
    """Measure, print and write the table; returns the exit code."""
    import torch

    from ..ops.choice import table_path
    from . import tune

    device = given.device or ("cuda" if torch.cuda.is_available() else "cpu")
    path = given.output or table_path()
    for row in tune(device, given.seconds, path):
        limit = "" if row["below"] is None else f" up to 2^{row['below']}"
        print(f"{row['op']:18} {row['dtype']:9}{limit:13} {row['order'][0]:10} {row['because']}")
    print(f"written to {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
