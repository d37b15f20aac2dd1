"""Shares of a batch and slices of a bank are exact, on two and three real processes."""

import pytest

from .launch import torchrun

CHECKS = {"check_exchanges", "check_sharded_search", "check_objectives"}


@pytest.mark.parametrize("ranks", [2, 3])
def test_shares_and_slices_equal_the_whole(ranks, tmp_path):
    done = torchrun(ranks, "tests.distributed.checks", str(tmp_path))
    assert done.returncode == 0, done.stdout
    assert {path.name for path in tmp_path.iterdir()} == CHECKS
