"""Shares of a batch and slices of a bank are exact, on two and three real processes."""

import pytest

from .launch import torchrun

CHECKS = {"check_exchanges", "check_sharded_search", "check_objectives", "check_training_gradients"}


@pytest.mark.parametrize("ranks", [2, 3])
def test_shares_and_slices_equal_the_whole(ranks, tmp_path, weights):
    done = torchrun(ranks, "tests.distributed.checks", str(tmp_path), str(weights))
    assert done.returncode == 0, done.stdout
    assert {path.name for path in tmp_path.glob("check_*")} == CHECKS
