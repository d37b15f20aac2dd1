"""The README: its Python runs as printed, and what it names exists."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_python_examples_run(tmp_path, monkeypatch):
    examples = re.findall(r"^```python\n(.*?)^```", README, re.DOTALL | re.MULTILINE)
    assert examples
    monkeypatch.chdir(tmp_path)
    scope: dict[str, object] = {}
    for number, example in enumerate(examples):
        exec(compile(example, f"README.md example {number + 1}", "exec"), scope)


def test_options_in_the_table_exist():
    from saferclip_fast.config import options

    known = {option.key: option for option in options()}
    named = re.findall(r"`((?:model|data|objective|curriculum|train)\.[a-z_.*]+)`", README)
    assert len(named) >= 10
    for key in named:
        assert key in known or any(other.startswith(key.removesuffix("*")) for other in known), key


@pytest.mark.parametrize("page", [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))], ids=lambda p: p.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_make_targets_that_the_readme_names_exist():
    makefile = (ROOT / "Makefile").read_text()
    for target in set(re.findall(r"make ([a-z-]+)", README)):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
