"""python -m saferclip_fast.report RUN... --out report.html"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from ..cli import run_command
from .place import check_evaluated

EXAMPLES = """
examples:
  One run, evaluated first; the page is runs/visu/report.html.
    python -m saferclip_fast.evaluate runs/visu --dial
    python -m saferclip_fast.report runs/visu

  Two runs side by side.
    python -m saferclip_fast.report runs/visu runs/safe-clip --out both.html

A run is a folder with evaluation.json. Losses, safety dial and config are shown where log.jsonl, dial.json and
config.yaml lie beside it. What the page shows: docs/report.md.
"""


def main(arguments: Sequence[str] | None = None, prog: str = "python -m saferclip_fast.report") -> int:
    """Command line; returns the exit code: 0 done, 2 a run that cannot be read or a page that cannot be written."""
    parser = argparse.ArgumentParser(
        prog=prog,
        description="Write one HTML page on a run, or on several side by side, that opens in any browser without a\n"
        "network: what changed, by how much, how sure that is. Unsafe text and images stay hidden until clicked.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of an evaluated run")
    parser.add_argument("--out", type=Path, metavar="FILE", help="the page (default: report.html in the first RUN)")
    given = parser.parse_args(arguments)
    out = given.out or given.runs[0] / "report.html"
    return run_command(lambda: run(given.runs, out))


def run(runs: Sequence[Path], out: Path) -> int:
    """Write the page; returns the exit code."""
    for folder in runs:
        check_evaluated(folder)
    from . import write

    write(runs, out)
    print(f"report: {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
