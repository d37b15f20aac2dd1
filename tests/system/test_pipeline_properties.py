"""Properties that hold whatever the values, of what is public above the ops: objectives, evaluate, report, export."""

from __future__ import annotations

import inspect
import re
import tempfile
import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from saferclip_fast import data, evaluate, export, objectives, report
from saferclip_fast.evaluate import metrics
from saferclip_fast.models import load_clip
from saferclip_fast.results import EVALUATION_FORMAT, evaluation_shape, misfits, of_any_cutoff
from tests.system.test_properties import FEW, assert_gradients_lie_across_rows, bank_of, randn, seeds, widths


@st.composite
def quadruplets(draw) -> tuple[objectives.QuadrupletEmbeddings, objectives.QuadrupletEmbeddings, torch.Tensor]:
    """Current rows, which want gradients, frozen rows, and labels [2, B]."""
    rows = draw(st.integers(1, 9))
    *current, a, b, c, d = randn(8, rows, draw(widths), seed=draw(seeds)).unbind()
    labels = torch.tensor(draw(st.lists(st.integers(0, 1), min_size=2 * rows, max_size=2 * rows))).view(2, rows)
    current = objectives.QuadrupletEmbeddings(*(x.requires_grad_() for x in current))
    return current, objectives.QuadrupletEmbeddings(a, b, c, d), labels


@pytest.mark.parametrize("kind", [objectives.SaferClip, objectives.SafeClip, objectives.ShieldClip])
@FEW
@given(batch=quadruplets(), seed=seeds)
def test_an_objective_is_its_weighted_terms_whatever_the_order(kind, batch, seed):
    current, frozen, labels = batch
    objective, bank = kind(k=3) if kind is objectives.SaferClip else kind(), bank_of(7, frozen[0].shape[1], 6)
    objective.attach(bank)
    out = objective(current, frozen, bank, None, *labels)
    weights = dict(getattr(objective, "scale", objective.weights))
    for modality, term in (("text", "text_safe"), ("image", "vision_safe")):
        weights[f"kept_{modality}"] = weights.get(f"cos_{modality}", weights.get(term))
    expected = sum(weights[name] * term.double() for name, term in out.terms.items())
    torch.testing.assert_close(out.loss.double(), expected, rtol=1e-5, atol=1e-6)
    # the terms are not negative but for the rounding of a cosine of this width at logit scale 100, twice for sums
    lowest = -2 * 100 * (frozen[0].shape[1] + 2) * 2.0**-24
    assert all(float(term) >= lowest for term in out.terms.values())
    assert_gradients_lie_across_rows(out.loss, *current)
    order = torch.randperm(len(labels[0]), generator=torch.Generator().manual_seed(seed))
    shuffled = (objectives.QuadrupletEmbeddings(*(x[order] for x in side)) for side in (current, frozen))
    other = objective(*shuffled, bank, None, *labels[:, order])
    torch.testing.assert_close(other.loss, out.loss, rtol=1e-5, atol=1e-6)


@settings(max_examples=5)
@given(seeds, st.integers(2, 12), st.booleans(), st.floats(0, 1))
def test_whatever_was_measured_is_written_told_and_drawn(seed, rows, alone, mixed):
    """Of random embeddings: figures lie in their intervals, changes are differences, and the report takes the file."""
    task = evaluate.Task(data.SceneDataset(rows, seed=seed, size=8, mixed=mixed))
    options = evaluate.Settings(resamples=50, seed=seed, examples=3, worst_cases=2)
    sides = ["tuned"] if alone else ["frozen", "tuned"]
    measured = {}
    for number, name in enumerate(sides):
        embedded = objectives.QuadrupletEmbeddings(*randn(4, rows, 8, seed=seed + number).unbind())
        measured[name] = evaluate.Measured(embedded, metrics.retrieval(embedded, task.labels))
    models = {name: {"name": "m", "weights_hash": name} for name in sides}
    found = {"format": EVALUATION_FORMAT, "models": models, **evaluate.summarize(measured, task, options)}
    assert not list(misfits(found, evaluation_shape(found), "it"))
    assert found["metrics"].items() >= evaluate.estimates({s: m.metrics for s, m in measured.items()}, options).items()
    for name, entry in found["metrics"].items():
        for side in sides:
            assert entry[side]["low"] <= entry[side]["value"] <= entry[side]["high"], name
        if not alone:
            change = entry["tuned"]["value"] - entry["frozen"]["value"]
            assert entry["change"]["value"] == pytest.approx(change, abs=1e-6)
    told = evaluate.table(found), evaluate.label_tables(found), "" if alone else evaluate.comparison({"a": found})
    for name in found["key_metrics"]:
        assert of_any_cutoff(found["metrics"][name]["label"]).removesuffix(" in its first K") in told[0]
    assert len(re.findall(r": \d+ rows$", told[1], re.MULTILINE)) == len(found["safe_unsafe_table"])
    with tempfile.TemporaryDirectory() as folder:
        evaluate.write(found, measured, Path(folder))
        report.write([folder], Path(folder, "page.html"))
        [run] = report.load_runs([folder])
        assert Path(folder, "page.html").read_text() == report.render([run])
        for part, value in measured["tuned"].embeddings._asdict().items():
            assert torch.equal(run.embeddings["tuned"][part], value)


@settings(max_examples=3)
@given(seeds)
def test_an_exported_model_is_the_model(seed):
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # random weights
        torch.manual_seed(seed)
        clip = load_clip("ViT-tiny-8-32")
        source = export.load_source(clip.export(Path(folder, "model")).parent)
        assert source.clip.weights_hash == clip.weights_hash
        assert export.export(source, ["open_clip"], Path(folder, "out"))["open_clip"] <= 1e-6
        again = export.load_source(Path(folder, "out", "open_clip"))
        assert again.clip.weights_hash == clip.weights_hash


def public(module) -> list[str]:
    """Functions and objectives that it offers."""
    return [
        name
        for name in module.__all__
        if (inspect.isfunction(x := getattr(module, name)) and x.__module__.startswith(module.__name__))
        or (inspect.isclass(x) and issubclass(x, objectives.Objective) and x is not objectives.Objective)
    ]


@pytest.mark.parametrize("module", [objectives, evaluate, export, report])
def test_everything_public_is_here(module):
    """A public function or objective that is in no test of this file, has no property tested."""
    text = Path(__file__).read_text()
    # these need a model and images, and are tested with a few in tests/evaluate and tests/api
    of_models = ("evaluate", "measure", "dial_curve", "check_same_space", "evaluate_model", "published_table")
    elsewhere = (*of_models, "export_model")
    names = public(module)
    assert names
    for name in names:
        assert name in elsewhere or f"{module.__name__.rpartition('.')[2]}.{name}" in text, name
