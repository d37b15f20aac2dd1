"""The shape of the package: no import cycles, one version."""

import ast
import re
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import saferclip_fast

ROOT = Path(__file__).parents[1]
PACKAGE = "saferclip_fast"


def module_name(path: Path, root: Path) -> str:
    return ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")


def import_graph(root: Path) -> dict[str, set[str]]:
    """Module -> the modules of the package that it imports when it is imported itself.

    Imports inside functions, and for type checkers alone, wait until both modules are there.
    """
    files = {
        module_name(path, root): path for path in (root / PACKAGE).rglob("*.py*") if path.suffix in (".py", ".pyi")
    }
    graph = {}
    for name, path in files.items():
        parent = name if path.name == "__init__.py" else name.rpartition(".")[0]
        found: set[str] = set()
        for node in statements(ast.parse(path.read_text()).body):
            if isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                base = node.module or ""
                if node.level:
                    above = parent.split(".")[: len(parent.split(".")) - node.level + 1]
                    base = ".".join([*above, *([base] if base else [])])
                for alias in node.names:  # a submodule, or something in the module itself
                    found.add(f"{base}.{alias.name}" if f"{base}.{alias.name}" in files else base)
        graph[name] = {other for other in found & set(files) if other != name}
    return graph


def statements(body: list[ast.stmt]):
    """Those that run on import."""
    for node in body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        yield node
        for name in ("body", "orelse", "finalbody", "handlers"):
            yield from statements(getattr(node, name, []))


def cycle(graph: dict[str, set[str]]) -> list[str]:
    """The modules of one cycle, or nothing."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return error.args[1]
    return []


def test_modules_import_in_one_direction():
    graph = import_graph(ROOT)
    assert len(graph) > 60 and sum(map(len, graph.values())) > 150
    assert not (found := cycle(graph)), " -> ".join(found)


@pytest.mark.parametrize("late", [False, True])
def test_a_cycle_would_be_seen(tmp_path, late):
    """Unless one of the two imports waits."""
    package = tmp_path / PACKAGE
    package.mkdir()
    (package / "__init__.py").write_text("from .a import x\n")
    (package / "a.py").write_text("from . import b\n")
    (package / "b.py").write_text(
        "def f():\n    from .a import x\n" if late else "try:\n    from .a import x\nfinally: x\n"
    )
    assert bool(cycle(import_graph(tmp_path))) is not late


def test_modules_and_functions_can_be_read_in_one_sitting():
    for path in (ROOT / PACKAGE).rglob("*.py"):
        text = path.read_text()
        assert text.count("\n") <= 400, path
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                described = len((ast.get_docstring(node) or "").splitlines())
                assert node.end_lineno - node.lineno - described < 60, f"{path}: {node.name}"


def test_the_architecture_page_is_the_tree():
    page = (ROOT / "docs" / "architecture.md").read_text()
    entries = [path for path in (ROOT / PACKAGE).iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()]
    named = {path.name + "/" * path.is_dir() for path in entries if not path.name.startswith("__")}
    assert len(named) > 40 and {name for name in named if not re.search(rf"\b{re.escape(name)}", page)} == set()
    there = {path.name for path in ROOT.rglob("*.py") if "build" not in path.parts}
    assert set(re.findall(r"\w+\.py\b", page)) <= there


def test_the_newest_entry_of_the_changelog_is_this_version():
    versions = re.findall(r"^## \[(.+?)\] - (\d{4}-\d{2}-\d{2}|Unreleased)$", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert versions[0][0] == saferclip_fast.__version__
    assert re.fullmatch(r"\d+\.\d+\.\d+", saferclip_fast.__version__)


def test_the_version_is_written_once():
    written = [
        path
        for path in [*ROOT.glob("*.toml"), *ROOT.glob("*.py"), *ROOT.glob("*.txt"), *(ROOT / PACKAGE).rglob("*.py")]
        if re.search(rf"version\w*\s*=\s*[\"']{re.escape(saferclip_fast.__version__)}[\"']", path.read_text())
    ]
    assert written == [ROOT / PACKAGE / "version.py"]
