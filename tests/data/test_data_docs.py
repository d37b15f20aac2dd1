"""docs/data.md: every example runs as printed."""

import re
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[2] / "docs" / "data.md"


def test_the_examples_run_one_after_the_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("pyarrow")
    examples = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.DOTALL | re.MULTILINE)
    assert len(examples) >= 9
    monkeypatch.chdir(tmp_path)
    scope: dict[str, object] = {}
    for number, example in enumerate(examples):
        exec(compile(example, f"{PAGE.name} example {number + 1}", "exec"), scope)
