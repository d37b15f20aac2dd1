"""Shares of a batch, slices of a bank and gradients are exact, on two and three real processes (see checks.py)."""

import pytest

from tests.train.ranks.launch import torchrun


@pytest.mark.parametrize("ranks", [2, 3])
def test_shares_and_slices_equal_the_whole(ranks, tmp_path, weights):
    done = torchrun(ranks, "tests.train.ranks.checks", str(tmp_path), str(weights))
    assert done.returncode == 0, done.stdout
    assert len(list(tmp_path.glob("passed-*"))) == ranks
