"""Compiled kernels taken apart: registers, stack, and instructions by kernel and target."""

from __future__ import annotations

import functools
import importlib.util
import os
import re
import shutil
import subprocess
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from tests.backends.simt.build import CSRC, KERNELS, ROOT, SHARED, content_hash

TARGETS = ("80", "90a", "100a")
SOURCES = ("nearest_safe", "preservation_loss", "retarget_loss")
FLAGS = ["-std=c++17", "-O3", "-DNDEBUG"]


@dataclass
class Kernel:
    """One kernel as ptxas left it on one target."""

    registers: int = 0
    stack: int = 0
    local: int = 0
    instructions: Counter = field(default_factory=Counter)  # by full mnemonic, e.g. HMMA.16816.F32

    def count(self, prefix: str) -> int:
        return sum(n for name, n in self.instructions.items() if name.startswith(prefix))


def nvcc() -> str | None:
    return shutil.which("nvcc")


def cuobjdump() -> str | None:
    """On PATH, or inside the triton package."""
    found = importlib.util.find_spec("triton")
    inside = Path(found.origin).parent / "backends/nvidia/bin/cuobjdump" if found and found.origin else None
    return shutil.which("cuobjdump") or (str(inside) if inside and inside.exists() else None)


def object_file(name: str) -> Path:
    """The object that setup.py built if it is newer than every kernel source; otherwise compiled here, once."""
    newest = max(f.stat().st_mtime for f in [*KERNELS.iterdir(), *SHARED.glob("*.h"), ROOT / "CMakeLists.txt"])
    for built in ROOT.glob(f"build/*/cmake/CMakeFiles/*/csrc/kernels/cuda/{name}.cu.o"):
        if built.stat().st_mtime > newest:
            return built
    made = ROOT / "build" / "cuda" / f"{name}-{content_hash(SHARED, KERNELS, *FLAGS, *TARGETS)}.o"
    if not made.exists():
        made.parent.mkdir(parents=True, exist_ok=True)
        part = made.with_suffix(f".{os.getpid()}.part.o")
        codes = [f"-gencode=arch=compute_{t},code=sm_{t}" for t in TARGETS]
        command = [nvcc(), *FLAGS, f"-I{CSRC}", *codes, "-c", str(KERNELS / f"{name}.cu"), "-o", str(part)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, f"{name}.cu does not compile:\n{done.stderr[-4000:]}"
        part.replace(made)
    return made


def readable(mangled: str) -> str:
    """product_kernel<fp32> from _ZN9saferclip14product_kernelIfEE..."""
    match = re.search(r"(\d+)([a-z_]+_kernel)(?:I(f|NS_4(?:bf16|fp16)E)E)?", mangled)
    assert match, mangled
    types = {"f": "<fp32>", "NS_4bf16E": "<bf16>", "NS_4fp16E": "<fp16>", None: ""}
    return match[2] + types[match[3]]


@functools.cache
def kernels(target: str) -> dict[str, Kernel]:
    """Every kernel of the library for one target, by readable name."""
    found: dict[str, Kernel] = {}
    for name in SOURCES:
        dump = functools.partial(subprocess.run, capture_output=True, text=True, check=True)
        file = str(object_file(name))
        usage = dump([cuobjdump(), "-res-usage", "-arch", f"sm_{target}", file]).stdout
        for mangled, registers, stack, local in re.findall(
            r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage
        ):
            found[readable(mangled)] = Kernel(int(registers), int(stack), int(local))
        current = None
        for line in dump([cuobjdump(), "-sass", "-arch", f"sm_{target}", file]).stdout.splitlines():
            if "Function :" in line:
                current = found[readable(line.split()[-1])]
            elif match := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+\s+)?([A-Z][A-Z0-9_.]*)", line):
                current.instructions[match[1]] += 1
    return found
