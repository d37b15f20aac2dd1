"""Figures with intervals from values of single samples: means of several rates, places, chance levels, the table."""

import pytest
import torch

from saferclip_fast.evaluate import Settings, estimates, table
from saferclip_fast.evaluate.metrics import Metric
from saferclip_fast.results import CUTOFFS, UNSAFE_FOUND

SETTINGS = Settings(resamples=200)


def rates(shift=0.0):
    """The four searches at every K, over 40 samples of two and 20 of the other two."""
    metrics = {}
    for number, family in enumerate(UNSAFE_FOUND):
        count = 40 if number < 2 else 20
        for k in CUTOFFS:
            hits = (torch.arange(count) < count * min(1, 0.1 * number + 0.02 * k + shift)).float()
            metrics[f"{family}@{k}"] = Metric(f"{family} in its first {k}", "falls", hits, chance=0.1 * number)
    return metrics


def test_the_unsafe_rate_is_the_mean_of_four_searches_at_each_k():
    found = estimates({"frozen": rates(0.3), "tuned": rates()}, SETTINGS)
    for k in CUTOFFS:
        entry, parts = found[f"unsafe_rate@{k}"], [found[f"{family}@{k}"] for family in UNSAFE_FOUND]
        for side in ("frozen", "tuned", "change"):
            assert entry[side]["value"] == pytest.approx(sum(part[side]["value"] for part in parts) / 4)
        assert entry["change"]["high"] < 0 and entry["samples"] == 20 and entry["wanted"] == "falls"
        assert entry["chance"] == pytest.approx(0.15) and f"in its first {k}" in entry["label"].replace("place", "1")
    fewer = estimates({"tuned": {name: rates()[name] for name in rates() if name.startswith("safe")}}, SETTINGS)
    assert fewer["unsafe_rate@10"]["label"] == "mean of 2 searches: anything unsafe in its first 10"
    assert "unsafe_rate@10" not in estimates({"tuned": {"zero_shot.a": Metric("a", "stays", torch.ones(3))}}, SETTINGS)


def test_a_place_has_an_interval_within_the_gallery():
    same, apart = torch.full((30,), 4.0), torch.tensor([1.0, 101.0] * 15)
    metrics = {
        "same": Metric("", "rises", same, "place", 2.0, 101.0),
        "apart": Metric("", "rises", apart, "place", 2.0, 101.0),
    }
    found = estimates({"frozen": metrics, "tuned": metrics}, SETTINGS)
    assert found["same"]["tuned"] == {"value": 4.0, "low": 1.0, "high": 14.0}  # 3 of 30 may be 100 off
    assert found["same"]["change"] == {"value": 0.0, "low": -10.0, "high": 10.0}
    assert found["apart"]["unit"] == "place" and found["apart"]["chance"] == 2.0
    assert 1 < found["apart"]["tuned"]["low"] < found["apart"]["tuned"]["value"] == 51 < found["apart"]["tuned"]["high"]


def test_cosines_have_no_chance_and_no_rule_of_three():
    cosine = Metric("safe text, cosine to frozen", "stays", torch.ones(9), "cosine")
    found = estimates({"tuned": {"safe_text_cosine_to_frozen": cosine}}, SETTINGS)["safe_text_cosine_to_frozen"]
    assert found["tuned"] == {"value": 1.0, "low": 1.0, "high": 1.0} and "chance" not in found


def test_the_table_shows_every_k_beside_the_page_and_the_rest_below():
    metrics = estimates(
        {"frozen": rates(0.3), "tuned": rates() | {"zero_shot.a": Metric("a", "stays", torch.ones(9))}}
        | {"frozen": rates(0.3) | {"zero_shot.a": Metric("zero-shot accuracy on a", "stays", torch.ones(9))}},
        SETTINGS,
    )
    lines = table({"metrics": metrics, "key_metrics": ["unsafe_rate@10", "zero_shot"]}).splitlines()
    assert lines[0].split() == ["in", "its", "first", "K", "K=1", "K=5", "K=10", "K=20", "wanted"]
    row = "mean of 4 searches: anything unsafe  frozen   0.488   0.550     0.650 ["
    assert lines[1].startswith(row) and lines[1].endswith("falls")
    assert lines[2].split()[:3] == ["tuned", "0.188", "0.250"] and lines[3].split()[:3] == [
        "change",
        "-0.300",
        "-0.300",
    ]
    assert lines[4:6] == ["", lines[5]] and "frozen" in lines[5] and lines[6].startswith("a  1.000 [0.667, 1.000]")
