"""The wheel holds everything that the package reads, and works where no checkout is near."""

import os
import runpy
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import setuptools

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Path of a pure-Python wheel (compiling the native module is what the tests of the ops rest on)."""
    tree, out = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("dist")
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    shutil.copytree(
        ROOT / "saferclip_fast", tree / "saferclip_fast", ignore=shutil.ignore_patterns("__pycache__", "*.so")
    )
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-build-isolation", "--no-deps", "-w", out, tree]
    subprocess.run(command, check=True, env={**os.environ, "SAFERCLIP_FAST_NATIVE": "0"})
    return next(out.glob("saferclip_fast-*.whl"))


def test_wheel_holds_every_file_of_the_package(wheel):
    folder = ROOT / "saferclip_fast"
    wanted = {
        str(path.relative_to(ROOT))
        for path in folder.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and path.suffix != ".so"
    }
    assert {f"saferclip_fast/{name}" for name in ("py.typed", "configs/paper.yaml", "report/page.html")} <= wanted
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert held == wanted


def test_wheel_works_away_from_the_checkout(wheel, tmp_path):
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    code = (
        # an editable install would lend its native module
        "import sys; sys.meta_path[:] = [finder for finder in sys.meta_path if '_Editable' not in repr(finder)]\n"
        "import saferclip_fast as sf, saferclip_fast.report, torch\n"
        "from saferclip_fast.config import load_config\n"
        "load_config('demo')\n"
        "assert not sf.backends()['cpu'].usable and 'C++ compiler' in sf.backends()['cpu'].detail\n"
        "print(sf.__file__, sf.nearest_safe(torch.eye(3), torch.eye(3)).indices.flatten().tolist())"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(
        command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(tmp_path)}, check=True, stdout=subprocess.PIPE
    )
    assert done.stdout.decode().split(" ", 1) == [str(tmp_path / "saferclip_fast" / "__init__.py"), "[0, 1, 2]\n"]


def test_objects_of_an_editable_install_are_kept_for_each_kind_of_build(monkeypatch, tmp_path):
    monkeypatch.setattr(setuptools, "setup", lambda **settings: None)
    command = runpy.run_path(str(ROOT / "setup.py"))["CMakeBuild"](setuptools.Distribution())
    command.build_temp, command.editable_mode = str(tmp_path), True
    first = command.folder()
    assert first.parent == ROOT / "build" and command.folder() == first
    for name in ("CXX", "CXXFLAGS", "CUDACXX", "CUDAHOSTCXX", "CMAKE_ARGS", "SAFERCLIP_FAST_CUDA", "PATH"):
        with monkeypatch.context() as context:
            context.setenv(name, "other")
            assert command.folder() != first, name
    command.editable_mode = False
    assert command.folder() == tmp_path
