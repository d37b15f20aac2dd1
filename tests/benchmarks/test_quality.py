"""The quality benchmarks: variants and settings are what their names say, figures are means, tests choose nothing."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.quality import (
    ablation,
    comparison,
    full_size,
    gate,
    geometry,
    guard,
    patch,
    restore,
    runs,
    scores,
    tables,
)
from saferclip_fast.config import flatten, load_config
from saferclip_fast.objectives import DEFAULT_WEIGHTS, SafeClip, SaferClip, ShieldClip
from saferclip_fast.results import CUTOFFS, UNSAFE_FOUND, at
from saferclip_fast.train.prepare import build_objective

ROOT = Path(__file__).parents[2]


def test_ablation_variants_are_what_their_names_say():
    configs = {name: load_config("demo", options) for name, options in ablation.VARIANTS.items()}
    built = {name: build_objective(config) for name, config in configs.items()}
    stages = {name for name, config in configs.items() if not config.curriculum.enabled}
    assert stages == {"Safe-CLIP", "+ nearest targets", "+ relative loss", "ShieldCLIP"}
    assert isinstance(built["ShieldCLIP"], ShieldClip)
    assert [built[name].targets for name in ("Safe-CLIP", "+ nearest targets")] == ["pair", "nearest"]
    paper = built["+ curriculum = SafeR-CLIP"]
    assert (paper.k, paper.beta, paper.margin, paper.negative) == (1, 1, 0, "frozen")
    moving = built["SafeR-CLIP, moving negative"]
    assert moving.negative == "current" and moving.weights == paper.weights
    assert built["default"].weights == DEFAULT_WEIGHTS
    assert [built[name].k for name in ("default", "default, k 1", "default, k 4")] == [16, 1, 4]
    assert built["default, no rank guard"].weights == DEFAULT_WEIGHTS | {"rank_guard": 0.0}
    assert len({json.dumps(flatten(config)) for config in configs.values()}) == len(configs)


def test_ablation_summary_is_mean_and_standard_deviation_over_seeds(tmp_path):
    def found(value):
        return {"metrics": figures(value, value, value) | dict.fromkeys(ablation.DRIFT, value)}

    values = {(ablation.FROZEN, 0): 0.5, (ablation.FROZEN, 1): 0.5, ("default", 0): 0.1, ("default", 1): 0.3}
    rows = ablation.summarize({ablation.run_of("scenes", *key): found(value) for key, value in values.items()})
    assert [(row["data"], row["name"]) for row in rows] == [("scenes", ablation.FROZEN), ("scenes", "default")]
    zero_shot = rows[1]["metrics"]["zero_shot"]
    assert zero_shot == {"mean": pytest.approx(0.2), "std": pytest.approx(math.sqrt(0.02)), "seeds": [0.1, 0.3]}
    assert "| default | 0.200 ± 0.141 |" in ablation.tables(rows)
    assert rows[1]["metrics"]["safe_queries@10"]["seeds"] == pytest.approx([0.9, 0.7])
    ablation.picture(rows, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 1000


def test_what_lies_far_out_does_not_squeeze_the_others():
    near = [0.909, 0.91, 0.915, 0.93, 0.936]
    low, high = ablation.bulk([0.726, *near])
    assert 0.85 < low < min(near) and max(near) < high < 0.97
    low, high = ablation.bulk([0.1, 0.3, 0.5, 0.7])
    assert low < 0.1 and high > 0.7, "nothing lies far out"


def figures(rate, zero_shot, others=0.5):
    """What perform() gives: the same unsafe rate everywhere, a zero-shot accuracy, and `others`."""
    names = (*tables.COLUMNS, "S-V.text_to_image@1", "S-V.image_to_text@1")
    rates = {at(name, k): rate for name in UNSAFE_FOUND for k in CUTOFFS}
    return dict.fromkeys(names, others) | rates | {runs.UTILITY: zero_shot}


def test_every_method_has_as_many_settings_and_its_own_objective(tmp_path):
    plan = runs.Plan(tmp_path, tmp_path, tmp_path / "photos.tar")
    tuned = {}
    for method in comparison.METHODS:
        configs = []
        for setting in comparison.SETTINGS[method]:
            run = comparison.run_of(plan, "scenes", method, setting, 0, 0.7)
            configs.append(load_config("demo", runs.options_of(plan, run)))
        sizes = {(c.train.epochs, c.train.batch_size, c.data.val) for c in configs}
        tuned[method] = {(c.lora.rank, c.lora.alpha, c.optimizer.lr) for c in configs}
        weights = {(c.objective.page, c.objective.weights.nce_text, c.objective.weights.nce_image) for c in configs}
        assert len(sizes) == 1
        assert len(tuned[method] | weights) == 5, "four, in adapters or in the objective"
        kind = {"Safe-CLIP": SafeClip, "ShieldCLIP": ShieldClip}.get(method, SaferClip)
        assert isinstance(build_objective(configs[0]), kind)
    ours = tuned.pop(comparison.OURS)
    rivals = next(iter(tuned.values()))
    assert all(settings == rivals for settings in tuned.values()) and ours < rivals
    paper, ours = (
        build_objective(load_config("demo", comparison.METHODS[name])) for name in ("SafeR-CLIP", comparison.OURS)
    )
    assert paper.weights["rank_guard"] == 0 and ours.weights == DEFAULT_WEIGHTS


def test_what_chooses_a_setting_does_not_report_it(tmp_path):
    plan = runs.Plan(tmp_path, tmp_path, tmp_path / "photos.tar")
    chosen, reported = (
        comparison.run_of(plan, "scenes", "Safe-CLIP", next(iter(comparison.SETTINGS["Safe-CLIP"])), seed, 0.7)
        for seed in (runs.VALIDATION_SEED, 0)
    )
    judged_on, tested_on = (runs.job_of(plan, run).held_out for run in (chosen, reported))
    assert not torch.equal(torch.from_numpy(judged_on.safe_images), torch.from_numpy(tested_on.safe_images))
    assert runs.source_of(plan, chosen) != runs.source_of(plan, reported)
    assert "seed=1001,split=test" in reported.options[-1] and "seed=2001,split=test" in chosen.options[-1]
    watched = comparison.run_of(
        plan, "photos", "Safe-CLIP", next(iter(comparison.SETTINGS["Safe-CLIP"])), 0, 0.7
    ).options[-1]
    assert watched.endswith("split=test,half=odd,mismatch=0.7"), "early stopping never sees the tested half"


def test_the_score_wants_safety_and_usefulness():
    frozen = figures(1.0, 0.8)
    assert comparison.score(frozen, frozen) == 0
    assert comparison.score(figures(0.0, 0.8), frozen) == 1
    assert comparison.score(figures(0.0, 0.4, 0.25), frozen) == pytest.approx(2 / 3)
    assert comparison.score(figures(0.5, 0.9), frozen) == pytest.approx(2 / 3), "more than frozen counts as frozen"
    assert comparison.score(figures(0.0, 0.0, 0.0), frozen) == 0
    assert comparison.score(figures(0.0, 0.8, 0.25), frozen) == pytest.approx(0.8), "safe retrieval counts, too"


def test_comparison_chooses_by_validation_and_reports_means(tmp_path, monkeypatch):
    best = {"Safe-CLIP": 3, "ShieldCLIP": 0, "SafeR-CLIP": 1, comparison.OURS: 2}
    asked = []

    def perform_all(plan, wanted, workers):
        results = {}
        for run in wanted:
            asked.append(run)
            if run.name == runs.FROZEN:
                results[run] = {"metrics": figures(1.0, 0.8), "dial": {}}
                continue
            options = comparison.SETTINGS[run.name].values()
            setting = next(i for i, words in enumerate(options) if set(words) <= set(run.options))
            rate = 0.1 if setting == best[run.name] else 0.9
            rate += 0.02 * run.seed if run.seed < runs.VALIDATION_SEED else 0
            metrics = figures(rate if run.name == comparison.OURS else min(1.0, rate + 0.3), 0.75)
            results[run] = {"metrics": metrics, "dial": {f"{alpha:g}": metrics for alpha in run.dial}}
        return results

    monkeypatch.setattr(comparison, "perform_all", perform_all)
    plan = runs.Plan(tmp_path, tmp_path, None)
    tried = comparison.tune(plan, ["scenes"], 1)
    chosen = {entry["method"]: entry["setting"] for entry in tried if entry["chosen"]}
    assert chosen == {method: list(comparison.SETTINGS[method])[number] for method, number in best.items()}
    assert {run.seed for run in asked} == {runs.VALIDATION_SEED}
    asked.clear()
    rows = comparison.report(plan, tried, range(3), 1, (0.7, 0.0))
    assert {run.seed for run in asked} == {0, 1, 2}
    ours = next(row for row in rows if row["name"] == comparison.OURS)
    assert ours["metrics"]["unsafe_rate@10"]["seeds"] == pytest.approx([0.1, 0.12, 0.14])
    dialed = {row["mismatch"] for row in rows if row["dial"]}
    assert dialed == {0.7}, "the dial is drawn where settings were chosen"
    found = comparison.against([row for row in rows if row["mismatch"] == 0.7], "Safe-CLIP")
    assert (found["ours"], found["best_of_rival"]) == pytest.approx((0.12, 0.42))
    summary = {"rows": rows, "tried": tried}
    assert "| SafeR-CLIP@K | 0.120 ± 0.020 |" in comparison.tables(summary)
    comparison.picture(summary, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 1000


def test_comparison_tables_are_the_committed_results():
    """README has the seeds that nothing had looked at, docs/method.md these and the first three."""
    method, readme = ((ROOT / page).read_text(encoding="utf-8") for page in ("docs/method.md", "README.md"))
    first, unseen = (
        json.loads((ROOT / "benchmarks" / "results" / "comparison" / f"{name}.json").read_text())
        for name in ("comparison", "unseen")
    )
    assert not set(first["seeds"]) & set(unseen["seeds"])
    for summary in (first, unseen):
        assert all(part in method for part in comparison.tables(summary).split("\n\n") if part.startswith("|"))
    few = {name: tables.COLUMNS[name] for name in comparison.FEW}
    for data in dict.fromkeys(row["data"] for row in unseen["rows"]):
        mismatch, *_ = comparison.MISMATCH[data]
        rows = [row for row in unseen["rows"] if (row["data"], row["mismatch"]) == (data, mismatch)]
        assert len(rows) == 5 and tables.table(rows, few) in readme


def test_what_is_said_of_the_price_is_the_committed_result():
    found = json.loads((ROOT / "benchmarks" / "results" / "comparison" / "unseen.json").read_text())
    table = comparison.changes(found)
    assert table in (ROOT / "docs" / "method.md").read_text(encoding="utf-8")
    readme = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    for line in table.splitlines()[2:]:
        name, accuracy, own, _ = (cell.strip() for cell in line.strip("|").split("|"))
        if name.endswith(("SafeR-CLIP", comparison.OURS)):
            assert own.lstrip("+-") in readme and accuracy in readme, line


def test_no_setting_of_a_rival_comes_near():
    """What README and docs/method.md say of the wider grids."""
    found = json.loads((ROOT / "benchmarks" / "results" / "comparison" / "unseen.json").read_text())
    page = " ".join((ROOT / "docs" / "method.md").read_text(encoding="utf-8").split())
    assert found["settings"] == json.loads(json.dumps(comparison.WIDER))
    for data, least in (("scenes", "none has under 0.963"), ("photos", "none under 0.497")):
        rivals = [e["metrics"] for e in found["tried"] if e["data"] == data and e["method"] != comparison.OURS]
        rates = sorted(rival["unsafe_rate@10"] for rival in rivals)
        assert len(rivals) == 24 and f"{rates[0]:.3f}" in least and least in page


def test_the_guards_table_is_the_committed_result_and_meets_its_goals():
    summary = json.loads((ROOT / "benchmarks" / "results" / "guard" / "guard.json").read_text())
    assert guard.tables(summary) in (ROOT / "docs" / "guard.md").read_text(encoding="utf-8")
    assert summary["rows"] == guard.over_seeds(summary["runs"]) and len(summary["seeds"]) == 3
    assert guard.misses(summary) == []
    summary["rows"][1]["auroc"]["seeds"][0] = 0.979
    summary["costs"]["RN-small-32"]["text"]["flops"] = 0.011
    assert [said.partition(":")[0] for said in guard.misses(summary)] == ["scenes, image", "RN-small-32, text"]


def test_the_gates_tables_are_the_committed_result():
    summary = json.loads((ROOT / "benchmarks" / "results" / "gate" / "gate.json").read_text())
    page = (ROOT / "docs" / "gate.md").read_text(encoding="utf-8")
    assert all(table in page for table in gate.tables(summary["rows"]).split("\n\n")) and len(summary["seeds"]) == 3
    for row in summary["rows"]:
        chosen, tuned, *_, frozen = row["curve"]
        assert chosen["chosen"] and set(tuned["kept"]["both"]["seeds"]) == {0}
        assert frozen["kept"]["both"]["seeds"] == [1, 1, 1]
        for point, name in ((frozen, "frozen"), (tuned, "tuned"), (chosen, "gated")):
            assert point[gate.RATE]["seeds"] == pytest.approx(row["models"][name][gate.RATE]["seeds"], abs=1e-3)
    before = gate.misses(summary["rows"])
    summary["rows"][0]["curve"][0]["kept"]["both"]["seeds"][1] = 0.5
    summary["rows"][1]["more_unsafe"]["seeds"][1] = 0.5
    assert set(gate.misses(summary["rows"])) - set(before) == {
        "scenes: 50.00% of safe inputs kept, under 99%",
        "photos: unsafe rate 0.500 above the tuned model's, more than 0.02",
    }


def test_tables_of_scores_are_the_committed_results():
    found = json.loads((ROOT / "benchmarks" / "results" / "scores" / "scores.json").read_text())
    method = (ROOT / "docs" / "method.md").read_text(encoding="utf-8")
    assert found["seeds"] == [0, 1, 2] and all(
        scores.table_of(found["rows"], data) in method for data in ("scenes", "photos")
    )


def test_rounded_scores_are_wrong_for_a_fifth_and_the_scores_are_honest(tmp_path):
    generator = np.random.default_rng(0)
    values = generator.beta(scores.SHAPE, scores.SHAPE, 200_000)
    assert np.minimum(values, 1 - values).mean() == pytest.approx(0.2, abs=0.003)
    assert [scores.redirected(way) for way in scores.WAYS] == pytest.approx([0.727, 0.8, 0.878], abs=0.002)
    plan = runs.Plan(tmp_path, tmp_path, None, quadruplets=400)
    rows = {
        name: [json.loads(line) for line in path.open()] for name, path in scores.tables_of(plan, "scenes", 0).items()
    }
    truth, score = (
        np.array([[row["unsafe_text_label"], row["unsafe_image_label"]] for row in rows[name]])
        for name in ("truth", "scores")
    )
    sure = score > 0.8
    assert truth[sure].mean() == pytest.approx(score[sure].mean(), abs=0.06)
    assert all(
        (row["unsafe_text"] == row["safe_text"]) >= (not label)
        for row, label in zip(rows["truth"], truth[:, 0], strict=True)
    )


def test_tables_of_restore_are_the_committed_results_and_its_shares_are_those_of_the_rise_and_the_gain():
    found = json.loads((ROOT / "benchmarks" / "results" / "restore" / "restore.json").read_text())
    page = (ROOT / "docs" / "restore.md").read_text(encoding="utf-8")
    assert found["seeds"] == [0, 1, 2] and all(
        restore.table_of(found["rows"], data) in page for data in ("scenes", "photos")
    )
    models = {
        "safe": {restore.RATE: 0.1, restore.OWN: 0.2},
        "later": {restore.RATE: 0.5, restore.OWN: 0.6},
        **{name: {restore.RATE: 0.2, restore.OWN: 0.5} for name in restore.THRESHOLDS},
    }
    one = {"data": "scenes", "models": models, "restored": {name: {"add": 0.5} for name in restore.THRESHOLDS}}
    back = restore.summarize([one])[-1]["metrics"]
    assert [back[part]["mean"] for part in ("rise taken back", "gain kept", "add")] == pytest.approx([0.75, 0.75, 0.5])


def test_tables_of_patch_are_the_committed_results_and_its_losses_are_the_largest():
    found = json.loads((ROOT / "benchmarks" / "results" / "patch" / "patch.json").read_text())
    page = (ROOT / "docs" / "patch.md").read_text(encoding="utf-8")
    assert {(one["data"], one["seed"]) for one in found["seeds"]} == {
        (data, seed) for data in ("scenes", "photos") for seed in range(3)
    }
    assert json.loads(json.dumps(patch.summarize(found["seeds"]))) == found["rows"]
    assert all(patch.table_of(found["rows"], data) in page for data in ("scenes", "photos"))

    then = {"new@10": 0.8, "new@1": 0.5, "old@10": 0.1, "zero_shot": 0.9, **dict.fromkeys(patch.KEPT[1:], 0.7)}
    now = then | {"new@10": 0.2, "old@10": 0.105, "zero_shot": 0.88, patch.KEPT[1]: 0.75}
    assert patch.worst(then, now) == pytest.approx(0.02)
    one = {"data": "scenes", "models": {"before": then, "16": now}, "patches": {"16": {"part": 0.5}}}
    row = patch.summarize([one])[-1]["metrics"]
    assert [row[name]["mean"] for name in ("fall", "worst", "part")] == pytest.approx([0.75, 0.02, 0.5])


def test_the_hazard_that_is_left_out_is_another_one_for_each_seed_and_in_no_other_list():
    for data in ("scenes", "photos"):
        out = [patch.left_out(data, seed) for seed in range(3)]
        assert len({new for new, _ in out}) == 3
        assert all({new, *old.split("+")} == set(patch.HAZARDS[data]) and new not in old.split("+") for new, old in out)
    plan = runs.Plan(ROOT, ROOT, ROOT / "photos.tar")
    held_out = [patch.source_of(plan, "photos", 9, seed, "test", "fire", 0.0) for seed in (0, runs.VALIDATION_SEED)]
    assert held_out[0].endswith("half=even") and held_out[1].endswith("half=odd")


def test_weights_of_the_geometry_terms_are_chosen_by_validation_and_reported_on_tests(tmp_path, monkeypatch):
    asked = []

    def perform_all(plan, wanted, workers):
        asked.extend(wanted)
        return {run: {"metrics": figures(0.5, 0.8) | spreads(run)} for run in wanted}

    def spreads(run):  # the larger weight keeps the more of the spread, the smaller one of the neighbors
        value = {"spread": 0.5 + 0.01 * weight_of(run), "neighbors": 0.9 - 0.01 * weight_of(run)}.get(run.name, 1.2)
        return {f"safe_{side}_{figure}": value for side in ("text", "image") for figure in geometry.KEPT.values()}

    def weight_of(run):
        return float(next((o.partition("=")[2] for o in run.options if "weights" in o), 0))

    monkeypatch.setattr(geometry, "perform_all", perform_all)
    chosen = geometry.choose(runs.Plan(tmp_path, tmp_path, None), ["scenes"], 1)
    assert {run.seed for run in asked} == {runs.VALIDATION_SEED}
    assert [(row["term"], row["weight"]) for row in chosen if row["chosen"]] == [
        ("spread", geometry.WEIGHTS["spread"][1]),
        ("neighbors", geometry.WEIGHTS["neighbors"][0]),
    ]
    frozen = figures(1.0, 0.8)
    safe = figures(0.0, 0.8) | spreads(runs.Run("scenes", "default", 0))
    assert geometry.merit(safe, frozen) == 1, "more spread than the frozen model's counts as its"
    assert geometry.merit(safe | dict.fromkeys(spreads(asked[0]), 0.5), frozen) == pytest.approx(2 / 3)
    for name, weights in geometry.WEIGHTS.items():
        built = build_objective(load_config("demo", geometry.run_of("scenes", name, 0, weights[0]).options))
        assert built.weights == DEFAULT_WEIGHTS | {name: weights[0]}


def test_the_table_of_the_geometry_terms_is_the_committed_result():
    found = json.loads((ROOT / "benchmarks" / "results" / "geometry" / "geometry.json").read_text())
    related = (ROOT / "docs" / "related.md").read_text(encoding="utf-8")
    assert all(geometry.table_of(found["rows"], data) in related for data in ("scenes", "photos"))
    assert {row["name"] for row in found["rows"]} == {runs.FROZEN, geometry.DEFAULT, *geometry.WEIGHTS}


def test_the_tables_of_the_demos_size_are_the_committed_result():
    found = json.loads((ROOT / "benchmarks" / "results" / "full_size" / "full_size.json").read_text())
    assert full_size.at_every_rank(found["rows"], "scenes") in (ROOT / "README.md").read_text()
    method = (ROOT / "docs" / "method.md").read_text()
    for data in ("scenes", "photos"):
        rows = [row for row in found["rows"] if row["data"] == data]
        assert full_size.at_every_rank(found["rows"], data) in method and tables.table(rows) in method
    demo = flatten(load_config("demo"))
    plan = runs.Plan(Path("out"), Path("cache"), Path("photos.tar"))
    for data in ("scenes", "photos"):
        options = flatten(load_config("demo", full_size.run_of(plan, data, full_size.OURS, 0).options))
        assert {key for key in demo if options[key] != demo[key]} <= {"objective.page"}, "the demo's own setting"
        rival = full_size.run_of(plan, data, full_size.BASELINE, 0, "3e-3").options
        assert set(rival) > set(full_size.BASELINE_OPTIONS) and "optimizer.lr=3e-3" in rival
        chosen = [entry for entry in found["tried"] if entry["data"] == data and entry["chosen"]]
        assert [entry["score"] for entry in chosen] == [max(e["score"] for e in found["tried"] if e["data"] == data)]
        assert set(options_of_rows(found, data, full_size.BASELINE)) >= {f"optimizer.lr={chosen[0]['rate']}"}


def options_of_rows(found, data, name):
    (row,) = [row for row in found["rows"] if (row["data"], row["name"]) == (data, name)]
    return row["options"]
