"""Compiles the CUDA kernels as host C++ against the SIMT executor, once per content."""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
SIMT = ROOT / "tests" / "backends" / "simt"
CSRC = ROOT / "csrc"
SHARED = CSRC / "kernels"  # headers for every device
KERNELS = SHARED / "cuda"
CACHE = ROOT / "build" / "simt"
FLAGS = ["-std=c++20", "-O1", "-fPIC", "-shared", "-fvisibility=hidden", "-DSAFERCLIP_SIMT", "-Wno-unknown-pragmas"]


def content_hash(*parts: str | Path) -> str:
    """Of texts, and of the C++ files under folders."""
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, Path):
            for file in sorted(f for f in part.iterdir() if f.suffix in {".h", ".cuh", ".cu", ".cpp"}):
                digest.update(file.name.encode() + file.read_bytes())
        else:
            digest.update(part.encode())
    return digest.hexdigest()[:16]


def compiler() -> str:
    found = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    assert found, "the SIMT executor needs a C++20 compiler (g++ or clang++): set CXX"
    return found


def build(source: Path, *, kernels: Path = KERNELS, flags: tuple[str, ...] = ()) -> Path:
    """Shared library of one test source; `kernels` may point to a mutated copy of the kernel folder."""
    key = content_hash(source.name, *FLAGS, *flags, compiler(), SIMT, SHARED, kernels)
    library = CACHE / f"{source.stem}-{key}.so"
    if not library.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        part = library.with_suffix(f".{os.getpid()}.part")
        command = [compiler(), *FLAGS, *flags, f"-I{SIMT}", f"-I{kernels}", f"-I{CSRC}", str(source), "-o", str(part)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, f"{source.name} does not compile:\n{done.stderr[-4000:]}"
        part.replace(library)
    return library


def load(name: str, **options) -> ctypes.CDLL:
    return ctypes.CDLL(str(build(SIMT / f"run_{name}.cpp", **options)))
