"""Coverage-guided fuzzing of every reader with atheris: python -m tests.system.fuzz.run --seconds 600 [--target NAME]

Each target gets an equal share of the time, in a process of its own. An input that raises something undocumented, or
crashes, is left in build/fuzz/TARGET/ and the exit code is not 0; the same command with the same folder goes on from
the corpus that it has found so far.
"""

from __future__ import annotations

import argparse
import hashlib
import logging
import os
import sys
import warnings
from pathlib import Path

import atheris

CORPUS = Path("build/fuzz")


def fuzz(target, seconds: int) -> None:
    """Fuzzes one target for so long; ends the process."""
    corpus = CORPUS / target.name
    corpus.mkdir(parents=True, exist_ok=True)
    for number, content in enumerate(target.seeds()):
        (corpus / f"seed-{number}").write_bytes(content)

    def read(content: bytes) -> None:
        try:
            target(content)
        except Exception:  # libFuzzer keeps the inputs of crashes, not those of Python's errors
            (corpus / f"fault-{hashlib.sha256(content).hexdigest()[:12]}").write_bytes(content)
            raise

    options = [f"-max_total_time={seconds}", f"-artifact_prefix={corpus}/", "-timeout=20", "-rss_limit_mb=4096"]
    atheris.Setup([sys.argv[0], *options, "-print_final_stats=1", str(corpus)], read)
    atheris.Fuzz()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=int, default=600, help="in all (default: %(default)s)")
    parser.add_argument("--target", help="only this one")
    given = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported: its threads would not survive the fork
    logging.disable()  # atheris's list of instrumented modules, and the readers' skipped rows
    warnings.simplefilter("ignore")
    with atheris.instrument_imports(include=["saferclip_fast"]):
        from tests.system.fuzz.targets import TARGETS

    targets = [t for t in TARGETS if given.target in (None, t.name)]
    if not targets:
        parser.error(f"--target {given.target}: choose from {', '.join(t.name for t in TARGETS)}")
    failed = []
    for target in targets:
        print(f"== {target.name}", flush=True)
        child = os.fork()  # instrumenting takes longer than a target's share of a short run
        if child == 0:
            fuzz(target, max(1, given.seconds // len(targets)))
        if os.waitpid(child, 0)[1]:
            failed.append(target.name)
    print("fuzzing found: " + ", ".join(f"{n} (input in {CORPUS / n})" for n in failed) if failed else "fuzzing: clean")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
