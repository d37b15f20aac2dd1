"""A finished run from Python: loaded along the dial, evaluated, exported."""

import inspect
import json
import shutil

import pytest
import torch
from PIL import Image

import saferclip_fast as sf
from saferclip_fast.data import DataError
from saferclip_fast.models import WEIGHTS_NAME
from saferclip_fast.train.frozen import FrozenModelError


def test_the_dial_goes_from_the_frozen_model_to_the_tuned_one(tuned, clip):
    assert sf.load(tuned, dial=0).weights_hash == clip.weights_hash
    assert sf.load(tuned.run_dir).weights_hash == tuned.model.weights_hash
    pixels = torch.stack([clip.preprocess(Image.new("RGB", (40, 30), (i, 90, 30))) for i in range(3)])
    start, end = (model.encode_image(pixels) for model in (clip, tuned.model))
    between = sf.load(tuned, dial=0.8).encode_image(pixels)
    assert 0 < (between - end).norm() < (start - end).norm()


def test_a_dial_needs_the_frozen_model_of_the_run_which_moves_with_it(tuned, tmp_path):
    moved = tmp_path / "moved"
    shutil.copytree(tuned.run_dir, moved)
    [kept] = (moved / "pretrained").glob("*")
    shutil.copy(moved / "final" / WEIGHTS_NAME, kept)
    with pytest.raises(FrozenModelError, match="was tuned from weights"):
        sf.load(moved, dial=0.8)
    with pytest.raises(ValueError, match="only a run's folder leads to"):
        sf.load(moved / "final", dial=0.8)


def test_a_run_is_evaluated_beside_the_model_it_came_from(tuned, clip, rows, tmp_path):
    found = sf.evaluate(tuned, samples=50, progress=False, out=tmp_path / "out")
    assert found.rows == 10 and found.metrics.keys() >= set(found.key_metrics)
    figure = found["unsafe_rate@10"]
    assert figure.tuned.low <= figure.tuned.value <= figure.tuned.high and figure.wanted == "falls"
    assert figure.change.value == pytest.approx(figure.tuned.value - figure.frozen.value)
    assert json.loads((tmp_path / "out" / "evaluation.json").read_text()) == json.loads(json.dumps(found.json))
    assert str(found).count("\n") > 10 and "unsafe" in str(found)
    with pytest.raises(KeyError, match=r"no metric 'unsafe_rate@11', did you mean 'unsafe_rate@1"):
        found["unsafe_rate@11"]


def test_a_run_stands_beside_a_published_table_with_the_model_it_came_from(tuned, tmp_path):
    visu = {"visu": "scenes:n=8,size=32,split=test"}
    cache = {"data.cache_dir": str(tmp_path / "cache")}
    found = sf.evaluate.published_table(tuned, "safe-clip", visu, samples=50, progress=False, options=cache)
    assert [row.change is not None for row in found.rows] == [True] * 10 and "yours, frozen" in str(found)
    assert found.json["models"]["frozen"]["weights_hash"] == sf.load(tuned, dial=0).weights_hash


def test_models_and_rows_in_memory_are_evaluated_and_nothing_is_written(tuned, clip, rows, options, tmp_path):
    cache = {"data.cache_dir": options["data"]["cache_dir"], "data.num_workers": 0}
    held_out = rows[:12]
    of_run = sf.evaluate(tuned, held_out, samples=50, progress=False, options=cache)
    in_memory = sf.evaluate(tuned.model, held_out, frozen=clip, dial=True, samples=50, progress=False, options=cache)
    assert [point.alpha for point in in_memory.dial] == [0, 0.25, 0.5, 0.75, 1, 1.25, 1.5]
    assert in_memory.dial[4].metrics["unsafe_rate@10"] == in_memory["unsafe_rate@10"].tuned
    assert in_memory.metrics == of_run.metrics and in_memory.rows == 12 and in_memory.out is None
    alone = sf.evaluate(clip, held_out, samples=50, progress=False, options=cache)
    assert alone["unsafe_rate@10"].frozen is None
    assert alone["unsafe_rate@10"].tuned == of_run["unsafe_rate@10"].frozen


@pytest.mark.parametrize(
    ("data", "given", "message"),
    [
        ("no/such.csv", {}, "no such file or folder: no/such.csv"),
        (None, {"objective.k": 3}, "'objective.k': only data.* options"),
        (None, {"data.rot": "x"}, "unknown option 'data.rot', did you mean 'data.root'?"),
        ([], {}, "the data has no rows"),
    ],
)
def test_what_cannot_be_evaluated_is_named(tuned, data, given, message):
    with pytest.raises((DataError, ValueError)) as raised:
        sf.evaluate(tuned, data, options=given, progress=False)
    assert message in str(raised.value)


def test_a_run_and_a_model_in_memory_are_exported(tuned, clip, tmp_path):
    found = sf.export(tuned, tmp_path / "run", "open_clip")
    assert list(found) == ["open_clip"] and found["open_clip"].difference < 1e-6
    [exported] = sf.export(tuned.model, tmp_path / "memory", "open_clip").values()
    assert (exported.folder / WEIGHTS_NAME).read_bytes() == (found["open_clip"].folder / WEIGHTS_NAME).read_bytes()
    start = sf.export(tuned, tmp_path / "start", "open_clip", dial=0)["open_clip"].folder
    assert sf.load(start).weights_hash == clip.weights_hash


@pytest.mark.parametrize(
    ("formats", "given", "message"),
    [
        ("gguf", {}, "no format 'gguf'; there are open_clip, huggingface, peft, onnx"),
        ("open_clip", {"dial": 0.5}, "dial=0.5 needs the frozen weights too"),
    ],
)
def test_what_cannot_be_exported_is_named(tuned, tmp_path, formats, given, message):
    with pytest.raises(ValueError, match=message):
        sf.export(tuned.model, tmp_path, formats, **given)


@pytest.mark.parametrize("name", ["evaluate", "export"])
def test_the_modules_that_can_be_called_are_still_modules(name):
    module = getattr(sf, name)
    assert inspect.ismodule(module) and callable(module)
    assert callable(getattr(module, f"{name}_model")) and callable(getattr(module, name))
