"""docs/errors.md quotes what the code says: every quoted line is a message in the source, or a part of one."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "errors.md").read_text()
QUOTES = re.findall(r"^    (\S.*)$", PAGE, re.MULTILINE)
GAP = "…"  # what is filled in when the message is made


def templates() -> list[str]:
    """Every text in the package, with a gap for each value that is filled in."""
    found = []
    for path in (ROOT / "saferclip_fast").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                found.append("".join(v.value if isinstance(v, ast.Constant) else GAP for v in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return found


TEMPLATES = templates()


@pytest.mark.parametrize("quote", QUOTES)
def test_the_code_says_so(quote):
    assert any(quote in template for template in TEMPLATES), quote


def test_a_message_that_nothing_says_is_noticed():
    assert len(QUOTES) >= 30
    assert not any("the bank is on fire" in template for template in TEMPLATES)
