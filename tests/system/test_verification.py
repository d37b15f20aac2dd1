"""docs/verification.md names what exists: every test, file, make target and section of the README."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "verification.md").read_text()
README = (ROOT / "README.md").read_text()
NAMED = sorted(set(re.findall(r"`((?:tests|benchmarks|examples|docs)/[\w/]+\.(?:py|md|cpp)(?:::\w+)?)", PAGE)))


def headings(page: str) -> list[str]:
    return re.findall(r"^## (.+)$", page, re.MULTILINE)


@pytest.mark.parametrize("name", NAMED)
def test_what_shows_a_claim_exists(name):
    file, _, test = name.partition("::")
    assert (ROOT / file).is_file(), file
    if test:
        defined = {node.name for node in ast.parse((ROOT / file).read_text()).body if isinstance(node, ast.FunctionDef)}
        assert test in defined, f"{file} has no {test}"


def test_every_section_of_the_readme_has_its_claims():
    without_claims = {"Citation"}
    assert set(headings(README)) - without_claims <= set(headings(PAGE))


def test_every_claim_has_something_that_shows_it():
    rows = [line for line in PAGE.splitlines() if line.startswith("| ") and not line.startswith("| claim")]
    assert len(rows) >= 35
    for row in rows:
        claim, shown, _ = (cell.strip() for cell in row.strip("|").split(" | "))
        assert "`" in shown, f"nothing shows: {claim}"


def test_commands_exist():
    makefile = (ROOT / "Makefile").read_text()
    for target in set(re.findall(r"`make ([a-z-]+)", PAGE)):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
