"""train.profile: a trace and a table of where a step's time goes."""

import json

import pytest

from saferclip_fast.train import train
from saferclip_fast.train.profiling import PARTS


def test_profile_says_where_a_step_goes(tiny, tmp_path):
    train(tiny(tmp_path, "train.epochs=1", "curriculum.enabled=false", "checkpoint.every_steps=99", "train.profile=4"))
    events = json.loads((tmp_path / "profile" / "trace.json").read_text())["traceEvents"]
    table = (tmp_path / "profile" / "table.txt").read_text()
    assert table.startswith("milliseconds a step, mean of 4\n") and "aten::addmm" in table
    for part in PARTS:
        assert sum(event.get("name") == part for event in events) == 4, part
    times = dict(line.split()[:2] for line in table.splitlines()[1:6])
    assert tuple(times) == PARTS
    whole = sum(e["dur"] / 1e3 for e in events if str(e.get("name")).startswith("ProfilerStep#") and "dur" in e) / 4
    assert 0.6 * whole < sum(map(float, times.values())) <= 1.01 * whole, "the parts are most of a step"


def test_a_run_too_short_for_its_profile_says_so(tiny, tmp_path):
    with pytest.warns(UserWarning, match="the run ended within the 3 steps that warm the profile up: no profile"):
        train(tiny(tmp_path, "train.epochs=1", "train.profile=2"))
