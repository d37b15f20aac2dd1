"""Assumptions that no execution here can test, checked against other sources: lane layouts and conversions."""

import importlib.util
import os
import subprocess
from pathlib import Path

import pytest

from tests.backends.simt import build


def cuda_include() -> Path | None:
    """The CUDA headers: of CUDA_HOME, of a toolkit in its usual place, or of NVIDIA's runtime packages."""
    found = importlib.util.find_spec("nvidia")
    folders = [Path(os.environ["CUDA_HOME"]) / "include"] if "CUDA_HOME" in os.environ else []
    folders.append(Path("/usr/local/cuda/include"))
    for place in found.submodule_search_locations if found else []:
        folders += sorted(Path(place).glob("*/include"))
    return next((f for f in folders if (f / "cuda_fp16.h").exists() and (f / "crt/host_defines.h").exists()), None)


def cutlass_include() -> Path | None:
    found = importlib.util.find_spec("cutlass_library")
    for place in found.submodule_search_locations if found else []:
        include = Path(place) / "source" / "include"
        if (include / "cute" / "atom" / "mma_traits_sm80.hpp").exists():
            return include
    return None


def run(name: str, *includes: Path) -> subprocess.CompletedProcess:
    source = build.SIMT / f"{name}.cpp"
    program = build.CACHE / f"{name}-{build.content_hash(build.SIMT, *map(str, includes))}"
    if not program.exists():
        build.CACHE.mkdir(parents=True, exist_ok=True)
        command = [build.compiler(), "-std=c++20", "-O1", "-w", f"-I{build.SIMT}", *(f"-I{i}" for i in includes)]
        done = subprocess.run([*command, str(source), "-o", str(program)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-4000:]
    return subprocess.run([str(program)], capture_output=True, text=True)


def test_lane_layouts_are_those_of_cute():
    cutlass, cuda = cutlass_include(), cuda_include()
    if cutlass is None:
        pytest.skip("needs the headers of the nvidia-cutlass package: pip install nvidia-cutlass")
    if cuda is None:
        pytest.skip("needs the CUDA headers (cuda_fp16.h), which CuTe includes")
    done = run("layouts", cutlass, cuda, cuda / "cccl")
    assert done.returncode == 0, done.stdout
    assert done.stdout.splitlines() == ["m16n8k16 f16", "m16n8k16 bf16", "ldmatrix.x4", "0 differences"]


def test_conversions_are_those_of_cuda():
    cuda = cuda_include()
    if cuda is None:
        pytest.skip("needs the CUDA headers cuda_fp16.h and cuda_bf16.h")
    done = run("conversions", cuda)
    assert done.returncode == 0, done.stdout
