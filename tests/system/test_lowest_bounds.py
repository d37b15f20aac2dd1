"""What make lowest-bounds installs is what pyproject.toml allows at least."""

from pathlib import Path

import pytest

from tests.system.lowest_bounds import USED, lowest, read

ROOT = Path(__file__).parents[2]


def test_every_dependency_is_pinned_to_its_bound():
    lines = read()
    assert {"torch==2.10", "open_clip_torch==3.3", "transformers==5.3", "pyarrow==16"} <= set(lines)
    assert len(lines) == len({line.partition("==")[0] for line in lines}) > 20 and len(USED) == 3


@pytest.mark.parametrize(
    "requirement, line",
    [
        ("torch>=2.10", ["torch==2.10"]),
        ("x[y]>=1.2,<3", ["x==1.2"]),
        ("x~=1.2", ["x==1.2"]),
        ("x>=1; platform_system == 'Nowhere'", []),
    ],
)
def test_the_bound_of_one(requirement, line):
    assert lowest([requirement]) == line


def test_one_without_a_bound_is_named():
    with pytest.raises(ValueError, match="braceexpand has no lower bound in pyproject"):
        lowest(["braceexpand"])


def test_make_runs_the_main_paths():
    rule = (ROOT / "Makefile").read_text().partition("\nlowest-bounds:")[2].partition("\n\n")[0]
    for part in ("tests/api", "tests/data/readers", "tests/train/test_train.py", "tests/export", "build/lowest"):
        assert part in rule
