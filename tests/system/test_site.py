"""The docs as a site: built without a warning, every page in it, the API reference from the docstrings."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def build(root: Path, out: Path) -> subprocess.CompletedProcess:
    # not --quiet, under which warnings are neither shown nor counted
    words = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(out)]
    return subprocess.run(words, cwd=root, capture_output=True, text=True, timeout=600)


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("site")
    done = build(ROOT, out)
    assert done.returncode == 0, done.stdout + done.stderr
    return out


def test_every_page_is_there_and_in_the_menu(site):
    index = (site / "index.html").read_text()
    for page in (ROOT / "docs").glob("*.md"):
        if page.stem != "README":
            assert (site / page.stem / "index.html").is_file(), page
            assert f'href="{page.stem}/"' in index, page


def test_the_reference_has_the_docstrings(site):
    page = re.sub(r"<[^>]+>", "", (site / "api" / "index.html").read_text())
    for words in (
        "Fine-tune a CLIP for safety",
        "run_dir",
        "KeyboardInterrupt",
        "Open source, choosing the reader by its name",
    ):
        assert words in page, words


def test_links_out_of_the_docs_lead_to_the_repository(site):
    page = (site / "index.html").read_text()
    assert 'href="https://github.com/saferclip-fast/saferclip-fast/blob/main/CONTRIBUTING.md"' in page
    assert "../CONTRIBUTING.md" not in page


def test_a_link_that_leads_nowhere_would_fail(tmp_path):
    for name in ("docs", "mkdocs.yml"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, tmp_path / name)
    (tmp_path / "docs" / "api.md").write_text("# API reference\n\n[nowhere](none.md)\n")
    done = build(tmp_path, tmp_path / "out")
    assert done.returncode != 0 and "none.md" in done.stdout + done.stderr
