"""Embed only unsafe inputs with the tuned model: python -m saferclip_fast.gate RUN --out DIR"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from ..cli import run_command
from ..evaluate.places import check_words
from ..results import GATE_CURVE
from .places import check_new, check_source, check_threshold, is_gate

EXAMPLES = """
examples:
  A run with a guard (saferclip guard runs/visu): its gate, at the guard's threshold, measured on what it held out.
    python -m saferclip_fast.gate runs/visu --out gates/visu --images food=food101/test

  A gate that is there, on other data and at a threshold of your own; the gate stays as it is.
    python -m saferclip_fast.gate gates/visu --out gates/visu-pairs --threshold 0.2 --data pairs.csv

In Python: sf.load_gate("gates/visu") is used as an open_clip model. One weights file cannot hold a gate, so it has no
export; the table that is printed shows what other thresholds would give. More: docs/gate.md.
"""


def main(words: Sequence[str] | None = None, prog: str = "python -m saferclip_fast.gate") -> int:
    """Command line; returns the exit code: 0 done, 2 a mistake in what was asked for, 130 stopped by Ctrl-C."""
    parser = argparse.ArgumentParser(
        prog=prog,
        description="Make a gate: an input keeps the frozen model's embedding, bit for bit, unless the guard finds it\n"
        "unsafe; only then the tuned model embeds it. Saves the gate and measures it along its threshold.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("source", type=Path, metavar="RUN", help="folder of a run with a guard, or of a gate")
    add("options", nargs="*", metavar="data.key=value", help="how the quadruplets are read, as in training")
    add("--out", type=Path, required=True, metavar="DIR", help="new folder: the gate, its evaluation and its curve")
    add(
        "--threshold",
        type=float,
        metavar="P",
        help="send inputs whose P(unsafe) is at or over it: 0 all, 1 none (default: the guard's, which lets 99.5 %% of "
        "safe validation items pass)",
    )
    add("--data", metavar="SOURCE", help="held-out quadruplets (default: the run's own)")
    add("--images", metavar="[NAME=]SOURCE", action="append", default=[], help="zero-shot set, repeatable")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    add("--batch-size", type=int, default=256, metavar="N", help="rows embedded at a time (default: 256)")
    add("--seed", type=int, default=0, help="of the bootstrap (default: 0)")
    add("--quiet", action="store_true", help="no progress bars")
    given = parser.parse_intermixed_args(words)
    return run_command(lambda: run(given), less_memory="the same in less memory: a smaller --batch-size")


def run(given: argparse.Namespace) -> int:
    """Makes and measures what the command line asks for; returns the exit code."""
    check_source(given.source)
    check_threshold(given.threshold)
    check_new(given.out)
    check_words(str(given.source), None, given.data, given.images, ())
    if given.batch_size < 1:
        raise ValueError(f"--batch-size must be at least 1, not {given.batch_size}")
    from ..evaluate.tables import table as evaluation_table  # torch and open_clip take seconds to import
    from .call import measure_gate
    from .curve import table

    found = measure_gate(
        given.source,
        given.out,
        given.data,
        threshold=given.threshold,
        images=given.images,
        options=given.options,
        device=given.device,
        batch_size=given.batch_size,
        seed=given.seed,
        progress=not given.quiet,
    )
    print(f"\n{found.evaluation.rows} held-out quadruplets; the gate beside the frozen model, 95 % intervals\n")
    print(f"{evaluation_table(found.evaluation.json)}\n\n{table(found.curve)}\n")
    if not is_gate(given.source):
        print(f"gate: {given.out}, in Python sf.load_gate('{given.out}')")
    print(f"curve: {given.out / GATE_CURVE}.json, .png, .svg\nas a page: python -m saferclip_fast.report {given.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
