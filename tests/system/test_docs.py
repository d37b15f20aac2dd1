"""README and docs: their Python runs as printed, and what they name exists."""

import importlib.util
import re
from pathlib import Path

import pytest

from saferclip_fast.config import options

ROOT = Path(__file__).parents[2]
OTHERS = ("README.md", "CONTRIBUTING.md", "SECURITY.md", "tests/README.md", "benchmarks/README.md")
PAGES = [*(ROOT / name for name in OTHERS), *sorted((ROOT / "docs").glob("*.md"))]
WITH_EXAMPLES = (ROOT / "README.md", ROOT / "docs" / "data.md", ROOT / "docs" / "python.md")


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_python_examples_run(page, tmp_path, monkeypatch):
    """In order and in one scope, as a reader would type them."""
    examples = re.findall(r"^```python\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)
    assert examples or page not in WITH_EXAMPLES
    monkeypatch.chdir(tmp_path)
    scope: dict[str, object] = {}
    for number, example in enumerate(examples):
        exec(compile(example, f"{page.name} example {number + 1}", "exec"), scope)


def test_options_that_pages_name_exist():
    known = {option.key for option in options()}
    groups = {key.split(".")[0] for key in known if "." in key}
    named = [
        (page.name, key)
        for page in PAGES
        for key in re.findall(rf"`((?:{'|'.join(groups)})\.[a-z_.]+\*?)[`=]", page.read_text())
        if not key.endswith((".py", ".md", ".jsonl"))
    ]
    assert len(named) >= 40
    for page, key in named:
        assert key in known or any(other.startswith(key.removesuffix("*")) for other in known), f"{page}: {key}"


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_modules_and_scripts_that_pages_name_exist(page):
    text = page.read_text()
    for module in re.findall(r"python -m saferclip_fast\.([a-z_]+)", text):
        assert importlib.util.find_spec(f"saferclip_fast.{module}"), f"{page.name}: {module}"
    for script in re.findall(r"python ((?:benchmarks|examples)/\w+\.py)", text):
        assert (ROOT / script).exists(), f"{page.name}: {script}"


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_make_targets_that_pages_name_exist(page):
    makefile = (ROOT / "Makefile").read_text()
    for target in set(re.findall(r"`make ([a-z-]+)", page.read_text())):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
