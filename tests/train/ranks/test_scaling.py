"""The scaling benchmark, on one rank at a tiny size: both of its works run."""

import pytest

from benchmarks.speed.scaling import ratio, search, training_step
from saferclip_fast.runtime.ranks import Ranks


def test_both_works_run():
    with pytest.warns(UserWarning, match="starts from random weights"):
        step = training_step(Ranks(), "ViT-tiny-8-32", 4)
    for run in (step, search(Ranks(), rows=50, width=32, queries=4, k=2)):
        assert ratio(Ranks(), run, repeats=2)["ratio"] > 0
