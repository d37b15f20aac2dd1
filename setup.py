"""Builds the native module `saferclip_fast._C` with CMake + Ninja; CMakeLists.txt holds the list of sources.

Environment: SAFERCLIP_FAST_NATIVE=0 builds the pure-Python package; SAFERCLIP_FAST_CUDA=0|1 forces CUDA off or on
(default: on where nvcc is found); MAX_JOBS limits the parallel compile jobs; CXX names the compiler;
CMAKE_ARGS holds further options for CMake.
"""

import hashlib
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


def wants_native() -> bool:
    """With no C++ compiler the package is pure Python, and `saferclip_fast.backends()` says so."""
    if os.environ.get("SAFERCLIP_FAST_NATIVE", "1") == "0":
        return False
    compiler = os.environ.get("CXX") or next(filter(shutil.which, ("c++", "g++", "clang++")), None)
    if compiler is None:
        print(
            "saferclip_fast: no C++ compiler found (set CXX); building the pure-Python package",
            file=sys.stderr,
        )
    return compiler is not None


class CMakeBuild(build_ext):
    def folder(self) -> Path:
        """Where objects go. An editable install's are kept, so that the next one compiles only what changed since."""
        if not self.editable_mode:
            return Path(self.build_temp).resolve()
        # by what CMake looks at once only: with another compiler it would go on with the first
        tools = (sys.executable, sys.version, *map(shutil.which, ("c++", "g++", "clang++", "nvcc")))
        compilers = ("CXX", "CXXFLAGS", "LDFLAGS", "CUDACXX", "CUDAHOSTCXX", "CUDAFLAGS")
        made_by = repr((*tools, *map(os.environ.get, (*compilers, "CMAKE_ARGS", "SAFERCLIP_FAST_CUDA"))))
        return ROOT / "build" / f"editable-{hashlib.sha256(made_by.encode()).hexdigest()[:8]}"

    def build_extension(self, ext: Extension) -> None:
        import pybind11
        from torch.utils import cpp_extension

        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        build = self.folder() / "cmake"
        build.mkdir(parents=True, exist_ok=True)
        arguments = {
            "CMAKE_BUILD_TYPE": "Debug" if self.debug else "Release",
            "CMAKE_LIBRARY_OUTPUT_DIRECTORY": target.parent,
            "Python_EXECUTABLE": sys.executable,
            "pybind11_DIR": pybind11.get_cmake_dir(),
            "TORCH_INCLUDE_DIRS": ";".join(cpp_extension.include_paths()),
            "TORCH_LIBRARY_DIRS": ";".join(cpp_extension.library_paths()),
            "SAFERCLIP_FAST_CUDA": os.environ.get("SAFERCLIP_FAST_CUDA", "AUTO"),
        }
        defines = [f"-D{name}={value}" for name, value in arguments.items()]
        defines += shlex.split(os.environ.get("CMAKE_ARGS", ""))
        # pip's cmake and ninja lie beside this Python, which need not be on PATH
        path = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", os.defpath)])
        environment = {**os.environ, "PATH": path}
        subprocess.run(["cmake", "-G", "Ninja", "-S", ROOT, "-B", build, *defines], check=True, env=environment)
        jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)
        subprocess.run(["cmake", "--build", build, "--parallel", jobs], check=True, env=environment)


setup(
    ext_modules=[Extension("saferclip_fast._C", sources=[])] if wants_native() else [],
    cmdclass={"build_ext": CMakeBuild},
)
