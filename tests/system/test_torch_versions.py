"""The native sources compile against the oldest torch that the package names, not only against the one installed."""

import re
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pybind11
import pytest
import triton

from tests.support.torch_headers import include_dirs

ROOT = Path(__file__).parents[2]
OLDEST = re.search(r'"torch>=([\d.]+)"', (ROOT / "pyproject.toml").read_text())[1] + ".0"
SOURCES = sorted(path.name for path in (ROOT / "csrc" / "ops").glob("*.cpp"))


@pytest.fixture(scope="module")
def torch_includes():
    try:
        return include_dirs(OLDEST)
    except LookupError as error:
        pytest.skip(f"{error}; set TORCH_HEADERS to a folder that holds {OLDEST}/include")


def cuda_include():
    """The CUDA runtime's headers, whole: those that Triton brings, or a toolkit's."""
    places = [Path(triton.__file__).parent / "backends/nvidia/include", Path("/usr/local/cuda/include")]
    return next((place for place in places if (place / "crt/host_defines.h").is_file()), None)


@pytest.mark.parametrize("source", SOURCES)
def test_sources_compile_with_the_oldest_torch(source, torch_includes):
    cmake = (ROOT / "CMakeLists.txt").read_text()
    order = re.search(r"target_include_directories\(_C SYSTEM PRIVATE (\$.*TORCH.*)\)", cmake)[1].split()
    places = {"${pybind11_INCLUDE_DIRS}": [pybind11.get_include()], "${TORCH_INCLUDE_DIRS}": torch_includes}
    system = [folder for name in order for folder in places[name]]
    flags = [f"-D{re.search(r'TORCH_TARGET_VERSION=[0-9a-fx]+', cmake)[0]}"]
    if "cuda" in source:
        if (cuda := cuda_include()) is None:
            pytest.skip("no CUDA runtime headers here")
        system.append(cuda)
        flags += ['-DSAFERCLIP_CUDA_ARCHITECTURES="80-real"', '-DSAFERCLIP_CUDA_VERSION="13.0"']
    flags += ["-std=c++20", "-fsyntax-only", f"-I{ROOT / 'csrc'}", f"-I{sysconfig.get_path('include')}"]
    flags += [word for folder in system for word in ("-isystem", str(folder))]
    compiler = shutil.which("c++") or shutil.which("g++")
    done = subprocess.run([compiler, *flags, ROOT / "csrc" / "ops" / source], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[:3000]
