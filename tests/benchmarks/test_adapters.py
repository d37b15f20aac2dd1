"""The benchmark of adapters: what its variants are, what chooses a rate, and that its tables are the results."""

import json
from pathlib import Path

import pytest

from benchmarks.quality import adapters, runs
from saferclip_fast.config import flatten, load_config

from .test_quality import figures

ROOT = Path(__file__).parents[2]


def test_rates_of_adapters_are_chosen_by_validation_and_reported_on_tests(tmp_path, monkeypatch):
    asked = []

    def perform(plan, run, curve):
        asked.append((run, curve))
        rate = next((float(word.partition("=")[2]) for word in run.options if "optimizer.lr" in word), 0)
        start = figures(1.0, 0.8)
        if run.name == runs.FROZEN:
            return {"points": {"0": start}, "seconds": 0.0}
        end = 0.5 - 0.1 * (rate == 1e-3) - 0.2 * ("Fisher" in run.name)  # 0.001 is every variant's best
        if not curve:
            return {"points": {"49": figures(end, 0.7)}, "seconds": 1.0}
        end += 0.05 * ("DoRA" in run.name) + 0.01 * run.seed
        return {"points": {"12": figures(0.6, 0.8), "24": figures(end, 0.7), "49": figures(end, 0.6)}, "seconds": 2.0}

    monkeypatch.setattr(adapters, "perform", perform)
    chosen = adapters.choose(runs.Plan(tmp_path, tmp_path, None), ["scenes"])
    assert {run.seed for run, _ in asked} == {runs.VALIDATION_SEED} and not any(curve for _, curve in asked)
    best = {row["name"]: row["lr"] for row in chosen if row["chosen"]}
    assert best == dict.fromkeys(adapters.VARIANTS, 1e-3)
    found = {}
    for seed in range(3):
        for name in (runs.FROZEN, *adapters.VARIANTS):
            run = adapters.run_of("scenes", name, seed, best.get(name, 0))
            found[run] = perform(None, run, True)
    rows = {row["name"]: row for row in adapters.summarize(found)}
    plain, dora, fisher, both = (rows[name] for name in adapters.VARIANTS)
    assert plain["metrics"]["steps"]["seeds"] == pytest.approx([24, 24, 24]) and plain["reached"] == 3
    assert dora["reached"] == 0 and "steps" not in dora["metrics"]
    # from 0.6 to 0.2, 0.21, 0.22 over twelve steps: 0.4, 0.41, 0.42 is there half-way, or nearly
    shares = [0.2 / 0.4, 0.19 / 0.39, 0.18 / 0.38]
    assert fisher["metrics"]["steps"]["seeds"] == pytest.approx([12 + 12 * share for share in shares])
    assert fisher["metrics"]["zero_shot there"]["seeds"] == pytest.approx([0.8 - 0.1 * share for share in shares])
    assert both["reached"] == 3 and both["metrics"]["zero_shot"]["mean"] == pytest.approx(0.6)
    assert "| LoRA, lr 0.001 | 0.410 ± 0.010 | 0.600 ± 0.000 |" in adapters.table_of(rows.values(), "scenes")


def test_a_rate_is_reached_on_the_line_to_the_first_point_that_is_as_safe():
    def at_rate(rate, zero_shot):
        return {adapters.RATE: rate, runs.UTILITY: zero_shot, adapters.RETRIEVAL: 0.5}

    points = {"0": at_rate(1.0, 0.9), "12": at_rate(0.4, 0.6), "49": at_rate(0.5, 0.3), "24": at_rate(0.2, 0.4)}
    there = adapters.reached(points, 0.7)
    assert there["steps"] == pytest.approx(6) and there["zero_shot there"] == pytest.approx(0.75)
    assert adapters.reached(points, 0.3)["steps"] == pytest.approx(18)
    assert adapters.reached(points, 0.1) is None


def test_the_adapters_of_the_benchmark_are_what_their_names_say_and_differ_in_nothing_else():
    configs = {
        name: flatten(load_config("demo", adapters.run_of("scenes", name, 0, 1e-3).options))
        for name in adapters.VARIANTS
    }
    kinds = {name: (config.pop("lora.dora"), config.pop("lora.init")) for name, config in configs.items()}
    assert [*kinds.values()] == [(False, "zero"), (True, "zero"), (False, "fisher"), (True, "fisher")]
    plain, *others = configs.values()
    assert all(other == plain for other in others) and plain["lora.rank"] == 32


def test_tables_of_adapters_are_the_committed_results():
    found = json.loads((ROOT / "benchmarks" / "results" / "adapters" / "adapters.json").read_text())
    related = (ROOT / "docs" / "related.md").read_text(encoding="utf-8")
    assert found["seeds"] == [0, 1, 2]
    for data in ("scenes", "photos"):
        assert adapters.table_of(found["rows"], data) in related
        for name in adapters.VARIANTS:
            tried = [row for row in found["chosen"] if (row["data"], row["name"]) == (data, name)]
            assert [row["score"] for row in tried if row["chosen"]] == [max(row["score"] for row in tried)]
