"""What works on this machine, and a self-check: python -m saferclip_fast.doctor"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from ..cli import run_command


def main(words: Sequence[str] | None = None, prog: str = "python -m saferclip_fast.doctor") -> int:
    """Command line; returns the exit code: 0 all well, 1 a backend that computes something else or fails."""
    parser = argparse.ArgumentParser(
        prog=prog,
        description="Say what is installed, what is built and usable, how much memory there is, and check every op on\n"
        "every backend against the reference. Takes a few seconds.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.parse_args(words)
    return run_command(run)


def run() -> int:
    """Print what is found; returns the exit code."""
    from ..ops import backends
    from . import describe, self_check

    print("\n".join(describe()))
    print("\nbackends")
    for name, row in backends().items():
        print(f"  {name:10} {'usable' if row.usable else 'no':7} {row.detail}")
    print("\nself-check, against the reference in float64")
    checks = []
    for check in self_check():
        told = f"error {check.error:.0e}, {check.milliseconds:.2f} ms" if check.passed else check.problem or "WRONG"
        print(f"  {check.op:18} {check.device:5} {check.backend:10} {told}", flush=True)
        checks.append(check)
    failed = [f"{check.op} on {check.backend}" for check in checks if not check.passed]
    print(f"\nfailed: {', '.join(failed)}" if failed else f"\nall {len(checks)} checks passed")
    for op in dict.fromkeys(check.op for check in checks):
        passed = [check for check in checks if check.op == op and check.passed]
        if passed:
            best = min(passed, key=lambda check: check.milliseconds)
            print(f"  {op}: {best.backend} is fastest here, on {best.device}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
