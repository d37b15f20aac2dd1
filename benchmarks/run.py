"""`make bench`: every benchmark in a process of its own, one JSON file each; what is measured already is left alone.

    python -m benchmarks.run                                  all of them, under 30 minutes on two cores
    python -m benchmarks.run --only retarget_loss --again     one of them, from the start
    python -m benchmarks.run --out results-of-mine --rounds 1    quick and rough, elsewhere

Ctrl-C loses the case in progress alone. benchmarks/README.md has the rules; render.py makes the tables and figures.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

from benchmarks import render
from benchmarks.harness import CORES, put_aside
from benchmarks.speed.nearest_safe import BLAS_SETTINGS

HERE = Path(__file__).resolve().parent
LIBRARIES = [
    *(["--faiss"] if find_spec("faiss") and find_spec("threadpoolctl") else []),
    *(["--numkong"] if find_spec("numkong") else []),
]
SEARCH = ["speed.nearest_safe", "--ks", "1,32", "--budget", "30", *LIBRARIES]
# (file of the results, module of this package and options)
ALL_CORES = [
    ("nearest_safe", [*SEARCH, "--data", "clip_like"]),
    ("nearest_safe", [*SEARCH, "--data", "gaussian", "--cases", "1024x100000"]),
    ("preservation_loss", ["speed.preservation_loss", "--large"]),
    ("bank", ["speed.bank"]),
    ("train_step", ["speed.train_step", "--rounds", "3", "--budget", "45"]),
    ("objective", ["speed.objective"]),  # on one thread it takes eight minutes more
    ("two_processes", ["speed.two_processes"]),  # of one thread each
]
ALL_CORES_AND_ONE = [
    ("nearest_safe_curves", ["speed.nearest_safe", "--curves"]),
    ("retarget_loss", ["speed.retarget_loss"]),
    ("preservation_loss", ["speed.preservation_loss", "--budget", "12"]),
    ("info_nce", ["speed.info_nce"]),
]
NAMES = list(dict.fromkeys(name for name, _ in ALL_CORES + ALL_CORES_AND_ONE))


def jobs(wanted: list[str]) -> list[tuple[str, list[str], int]]:
    """(name, module and options, threads) in order."""
    found = [(name, command, CORES) for name, command in ALL_CORES]
    found += [(name, command, n) for name, command in ALL_CORES_AND_ONE for n in sorted({1, CORES}, reverse=True)]
    return [job for job in found if job[0] in wanted]


def run(name: str, command: list[str], threads: int, out: Path, rounds: int | None) -> bool:
    """Whether it succeeded."""
    module, *options = command
    options += ["--json", str(out / f"{name}.json")]
    options += ["--rounds", str(rounds)] if rounds else []
    environment = {key: value for key, value in os.environ.items() if key not in BLAS_SETTINGS}
    environment["OMP_NUM_THREADS"] = str(threads)
    # the package of this checkout, whichever is installed
    environment["PYTHONPATH"] = os.pathsep.join([str(HERE.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    return subprocess.run([sys.executable, "-m", f"benchmarks.{module}", *options], env=environment).returncode == 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = NAMES
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="NAME", help=", ".join(names))
    parser.add_argument("--again", action="store_true", help="measure anew what the files hold already")
    parser.add_argument("--out", type=Path, default=HERE / "results", help="folder of the JSON (benchmarks/results)")
    parser.add_argument(
        "--rounds", type=int, help="calls of each path, for a quick look; default: each benchmark's own"
    )
    args = parser.parse_args()
    if args.again:
        for name in args.only:
            put_aside(args.out / f"{name}.json")
    failed, begin, todo = [], time.monotonic(), jobs(args.only)
    for number, (name, command, threads) in enumerate(todo, 1):
        so_far = time.strftime("%M:%S", time.gmtime(time.monotonic() - begin))
        print(f"[{number}/{len(todo)}, {so_far}] {name}, threads: {threads}", flush=True)
        if not run(name, command, threads, args.out, args.rounds):
            failed.append(f"{name} with {threads} threads")
    results = render.load(args.out)
    if render.lines(results):
        print(render.headline(results))
    print(f"{(time.monotonic() - begin) / 60:.1f} minutes; tables and figures: python -m benchmarks.render")
    if failed:
        print(f"failed: {', '.join(failed)}; the same command runs what is missing", file=sys.stderr)
    return bool(failed)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit("stopped; the same command, without --again, goes on where it was")
