"""A copy of the project whose native module is compiled with other flags, to run the ordinary op tests against."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PARTS = ("CMakeLists.txt", "README.md", "pyproject.toml", "setup.py", "csrc", "saferclip_fast", "tests")


def copy_and_build(name: str, flags: list[str], change: Callable[[Path], None] | None = None) -> Path:
    """The copy, in build/<name>; `change` may edit its sources before they are compiled."""
    tree = ROOT / "build" / name
    for part in PARTS:  # what is already compiled stays, so that a second build is quick
        source = ROOT / part
        if source.is_dir():
            shutil.rmtree(tree / part, ignore_errors=True)
            shutil.copytree(source, tree / part, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
        else:
            tree.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, tree / part)
    if change is not None:
        change(tree)
    build = {"SAFERCLIP_FAST_CUDA": "0", "CMAKE_ARGS": "-DSAFERCLIP_CPU_OPTIMIZE=-O1", "CXXFLAGS": shlex.join(flags)}
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    subprocess.run(command, cwd=tree, env={**os.environ, **build}, check=True)
    return tree


def run_tests(tree: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    """pytest inside the copy, which the copy's own module serves."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
    settings = {"PYTHONPATH": str(tree), "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(command, cwd=tree, env={**os.environ, **settings}, capture_output=True, text=True)
