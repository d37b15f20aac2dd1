"""Bootstrap intervals: hand-computed cases, pairing, coverage on a known distribution."""

import numpy as np
import pytest
import torch

from saferclip_fast.evaluate.bootstrap import average, resample, rule_of_three


def test_a_constant_has_no_width_and_the_value_is_the_mean():
    found = resample({"same": torch.ones(50), "half": torch.tensor([0.0, 1.0])})
    assert found["same"].interval() == {"value": 1.0, "low": 1.0, "high": 1.0}
    assert found["half"].value == 0.5
    # two samples: the mean of a resample is 0, 1/2 or 1 with probability 1/4, 1/2, 1/4
    shares = [(found["half"].means == mean).mean() for mean in (0, 0.5, 1)]
    assert shares == pytest.approx([0.25, 0.5, 0.25], abs=0.05)


def test_rates_that_all_samples_agree_on_have_the_rule_of_three():
    agreed = {value: resample({"x": torch.full((60,), value)})["x"].interval() for value in (0.0, 0.5, 1.0)}
    assert rule_of_three(agreed[0.0], 60) == {"value": 0.0, "low": 0.0, "high": 0.05}
    assert rule_of_three(agreed[1.0], 60) == {"value": 1.0, "low": 0.95, "high": 1.0}
    assert rule_of_three(agreed[0.5], 60) == pytest.approx({"value": 0.5, "low": 0.45, "high": 0.55})
    assert rule_of_three(agreed[0.0], 60, -1.0)["low"] == -0.05, "a change"
    assert rule_of_three(agreed[0.0], 2) == {"value": 0.0, "low": 0.0, "high": 1.0}
    place = {"value": 1.0, "low": 1.0, "high": 1.0}  # of 21: the other 3 of 60 may be 20 further down
    assert rule_of_three(place, 60, 1.0, 21.0, 20.0) == {"value": 1.0, "low": 1.0, "high": 2.0}
    assert rule_of_three(agreed[0.0], 60, -20.0, 20.0, 20.0) == {"value": 0.0, "low": -1.0, "high": 1.0}
    seen = resample({"x": torch.tensor([0.0] * 59 + [1.0])})["x"].interval()
    assert rule_of_three(seen, 60) == seen


def test_the_same_seed_gives_the_same_interval_and_pairs_differences():
    values = torch.rand(40, generator=torch.Generator().manual_seed(0))
    one, two = (resample({"a": values, "b": values + 0.25}, seed=3) for _ in range(2))
    assert one["a"].interval() == two["a"].interval() != resample({"a": values}, seed=4)["a"].interval()
    change = (one["b"] - one["a"]).interval()
    assert change == pytest.approx({"value": 0.25, "low": 0.25, "high": 0.25}, abs=1e-6)


def test_ninety_five_percent_of_intervals_hold_the_truth():
    draws = np.random.default_rng(1).random((400, 200)) < 0.3  # 400 studies of 200 samples of a rate of 0.3
    studies = {str(i): torch.from_numpy(row).float() for i, row in enumerate(draws)}
    intervals = [found.interval() for found in resample(studies).values()]
    covered = np.mean([i["low"] <= 0.3 <= i["high"] for i in intervals])
    assert 0.92 < covered < 0.975  # 0.95, three standard errors of 400 studies either way
    widths = np.mean([i["high"] - i["low"] for i in intervals])
    assert widths == pytest.approx(2 * 1.96 * (0.3 * 0.7 / 200) ** 0.5, rel=0.05)


def test_average_of_two_sets_is_as_sure_as_the_formula_says():
    generator = torch.Generator().manual_seed(0)
    sets = resample({"a": torch.rand(300, generator=generator), "b": torch.rand(700, generator=generator)})
    both = average(list(sets.values()))
    assert both.value == pytest.approx((sets["a"].value + sets["b"].value) / 2)
    assert both.means.std() == pytest.approx((1 / 12 / 300 + 1 / 12 / 700) ** 0.5 / 2, rel=0.1)


def test_an_empty_vector_is_named():
    with pytest.raises(ValueError, match="nothing has no sample"):
        resample({"nothing": torch.zeros(0)})
