"""The shape of the package: floors that are imported downwards alone, no circle, rooms of a size, one version."""

import ast
import re
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import NamedTuple

import pytest

import saferclip_fast

ROOT = Path(__file__).parents[2]
PACKAGE = "saferclip_fast"

# From the ground: a room imports rooms of lower floors alone, wherever the import is written.
# docs/architecture.md shows the same list.
FLOORS = (
    ("errors", "results", "version"),
    ("ops", "runtime"),
    ("cli", "storage"),
    ("bank", "data", "report"),
    ("doctor", "label_images", "models", "objectives", "recipes", "tune"),
    ("config", "embeddings"),
    ("train",),
    ("sources",),
    ("evaluate", "export"),
    ("api", "demo", "generate", "guard", "patch", "restore"),
    ("describe", "gate"),
)
LEVEL = {"_C": 0} | {room: level for level, floor in enumerate(FLOORS, 1) for room in floor}  # _C: the native module


def module_name(path: Path, root: Path) -> str:
    return ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")


class Import(NamedTuple):
    """An import of one module of the package by another."""

    source: str
    target: str
    place: str  # FILE:LINE
    on_import: bool  # it runs when the source is imported; others wait for a call or are for type checkers


def imports(root: Path) -> Iterator[Import]:
    """Every import inside the package, those in functions, under TYPE_CHECKING and in stubs included."""
    files: dict[str, list[Path]] = {}
    for path in (root / PACKAGE).rglob("*.py*"):
        if path.suffix in (".py", ".pyi"):
            files.setdefault(module_name(path, root), []).append(path)
    for name, paths in files.items():
        for path in paths:
            parent = name if path.stem == "__init__" else name.rpartition(".")[0]
            tree = ast.parse(path.read_text())
            running = set(map(id, statements(tree.body))) if path.suffix == ".py" else set()
            for node in ast.walk(tree):
                for target in targets(node, parent, files):
                    if target != name:
                        place = f"{path.relative_to(root)}:{node.lineno}"
                        yield Import(name, target, place, id(node) in running)


def targets(node: ast.AST, parent: str, files: dict[str, list[Path]]) -> Iterator[str]:
    """The modules of the package that an import statement names."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names if alias.name in files)
    elif isinstance(node, ast.ImportFrom):
        base = node.module or ""
        if node.level:
            above = parent.split(".")[: len(parent.split(".")) - node.level + 1]
            base = ".".join([*above, *([base] if base else [])])
        for alias in node.names:  # a submodule, or something in the module itself
            target = f"{base}.{alias.name}" if f"{base}.{alias.name}" in files else base
            if target in files:
                yield target


def import_graph(root: Path) -> dict[str, set[str]]:
    """Module -> the modules of the package that it imports when it is imported itself."""
    graph: dict[str, set[str]] = {}
    for found in imports(root):
        graph.setdefault(found.source, set())
        graph.setdefault(found.target, set())
        if found.on_import:
            graph[found.source].add(found.target)
    return graph


def room(module: str) -> str:
    """The file or folder at the package's root that a module lies in; "" for the package itself."""
    return module.removeprefix(PACKAGE).removeprefix(".").partition(".")[0]


def climbs(root: Path) -> list[str]:
    """Imports of a room by one that does not lie above it. Its __init__ and __main__ are doors to all floors."""
    found = []
    for one in imports(root):
        source, target = room(one.source), room(one.target)
        if source not in ("", "__main__") and source != target and not (target == "" or LEVEL[target] < LEVEL[source]):
            found.append(f"{one.place}: {source} (floor {LEVEL[source]}) imports {target} (floor {LEVEL[target]})")
    return found


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


def test_rooms_import_lower_floors_alone():
    assert not (found := climbs(ROOT)), "\n".join(found)


def test_an_import_that_climbs_would_be_seen_where_it_hides(tmp_path):
    package = tmp_path / PACKAGE
    (package / "data").mkdir(parents=True)
    (package / "__init__.py").write_text("from .demo import x\n")
    (package / "data" / "__init__.py").write_text("")
    (package / "data" / "__init__.pyi").write_text("from ..train import x\n")
    (package / "bank.py").write_text("if TYPE_CHECKING:\n    from .data import x\n")
    (package / "train.py").write_text("def f():\n    from . import demo\n    from .data import x\n")
    (package / "demo.py").write_text("from .train import f\n")
    assert sorted(climbs(tmp_path)) == [
        "saferclip_fast/bank.py:2: bank (floor 4) imports data (floor 4)",
        "saferclip_fast/data/__init__.pyi:1: data (floor 4) imports train (floor 7)",
        "saferclip_fast/train.py:2: train (floor 7) imports demo (floor 10)",
    ]


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


def rooms() -> set[str]:
    """The modules and packages at the package's root."""
    entries = (ROOT / PACKAGE).iterdir()
    return {e.stem for e in entries if (e / "__init__.py").is_file() or e.suffix == ".py"} - {"__init__", "__main__"}


def test_the_floors_are_the_tree_and_the_architecture_page_shows_them():
    assert LEVEL.keys() - {"_C"} == rooms()
    page = (ROOT / "docs" / "architecture.md").read_text()
    shown = re.findall(r"^\| (\d+) \| (.+?) \|", page, re.M)
    assert [(int(level), *re.findall(r"`(\w+)`", names)) for level, names in shown] == [
        (level, *floor) for level, floor in enumerate(FLOORS, 1)
    ]


def test_the_architecture_page_names_what_is_there():
    page = (ROOT / "docs" / "architecture.md").read_text()
    there = {path.name for path in ROOT.rglob("*.py") if "build" not in path.parts}
    assert set(re.findall(r"\w+\.py\b", page)) <= there
    folders = {path.name for path in (ROOT / PACKAGE).rglob("*") if (path / "__init__.py").is_file()}
    assert {name for name in folders if not re.search(rf"\b{name}/", page)} == set()


def test_few_files_lie_at_the_packages_root():
    files = [path for path in (ROOT / PACKAGE).iterdir() if path.is_file() and not path.name.startswith("_C.")]
    assert len(files) <= 12, files


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
