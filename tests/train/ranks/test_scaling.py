"""The scaling benchmark, on one rank at a tiny size: its works run."""

import pytest

from benchmarks.speed.scaling import default_objective, ratio, search, training_step
from saferclip_fast.runtime.ranks import Ranks


def test_works_run():
    with pytest.warns(UserWarning, match="starts from random weights"):
        step = training_step(Ranks(), "ViT-tiny-8-32", 4)
    objective = default_objective(Ranks(), bank_rows=50, width=32, batch_size=4, k=2)
    for run in (step, objective, search(Ranks(), rows=50, width=32, queries=4, k=2)):
        assert ratio(Ranks(), run, repeats=2)["ratio"] > 0
