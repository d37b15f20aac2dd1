"""Coverage-guided fuzzing of every reader with atheris: python -m tests.fuzz.run --seconds 600 [--target NAME]

Each target gets an equal share of the time, in a process of its own. An input that raises something undocumented, or
crashes, is left in build/fuzz/TARGET/ and the exit code is not 0; the same command with the same folder goes on from
the corpus that it has found so far.
"""

from __future__ import annotations

import argparse
import logging
import os
import subprocess
import sys
import warnings
from pathlib import Path

import atheris

CORPUS = Path("build/fuzz")


def fuzz(name: str, seconds: int) -> None:
    """Fuzzes one target for so long; does not return."""
    logging.disable()  # atheris's list of instrumented modules, and the readers' skipped rows
    warnings.simplefilter("ignore")
    with atheris.instrument_imports(include=["saferclip_fast"]):
        from .targets import TARGETS
    target = next(t for t in TARGETS if t.name == name)
    corpus = CORPUS / name
    corpus.mkdir(parents=True, exist_ok=True)
    for number, content in enumerate(target.seeds()):
        (corpus / f"seed-{number}").write_bytes(content)
    options = [f"-max_total_time={seconds}", f"-artifact_prefix={corpus}/", "-timeout=20", "-rss_limit_mb=4096"]
    atheris.Setup([sys.argv[0], *options, "-print_final_stats=1", str(corpus)], target)
    atheris.Fuzz()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=int, default=600, help="in all (default: %(default)s)")
    parser.add_argument("--target", help="only this one")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        fuzz(given.target, given.seconds)
    from .targets import TARGETS

    names = [t.name for t in TARGETS if given.target in (None, t.name)]
    if not names:
        parser.error(f"--target {given.target}: choose from {', '.join(t.name for t in TARGETS)}")
    failed = []
    for name in names:
        command = [sys.executable, "-m", __package__ + ".run", "--child", "--target", name]
        command += ["--seconds", str(max(1, given.seconds // len(names)))]
        print(f"== {name}", flush=True)
        if subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False).returncode:
            failed.append(name)
    print("fuzzing found: " + ", ".join(f"{n} (input in {CORPUS / n})" for n in failed) if failed else "fuzzing: clean")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
