"""The op tests in Python with a module built under AddressSanitizer and UndefinedBehaviorSanitizer: make sanitize-ops."""

from __future__ import annotations

import subprocess
import sys

from .instrumented import copy_and_build, run_tests

FLAGS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer", "-g1"]
TESTS = ("tests/ops", "tests/test_bank.py")


def runtime(name: str) -> str:
    """The path of a sanitizer's shared library, which Python itself is not linked with."""
    return subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout.strip()


def main() -> int:
    tree = copy_and_build("sanitize_ops", FLAGS)
    done = run_tests(
        tree,
        *TESTS,
        "-x",
        LD_PRELOAD=f"{runtime('libasan.so')} {runtime('libubsan.so')}",
        ASAN_OPTIONS="detect_leaks=0",  # the interpreter never frees all
        UBSAN_OPTIONS="print_stacktrace=1",
    )
    print(done.stdout[-4000:], done.stderr[-8000:], sep="\n")
    return done.returncode


if __name__ == "__main__":
    sys.exit(main())
