"""Safety put back after a later fine-tuning: from Python and by the command, and what it refuses."""

import json
import warnings

import open_clip
import pytest
import torch

import saferclip_fast as sf
from saferclip_fast.config import ConfigError
from saferclip_fast.restore.__main__ import main
from saferclip_fast.restore.call import STEPS, _least
from saferclip_fast.results import RESTORE_FORMAT, misfits, restore_shape
from saferclip_fast.train import train
from tests.support.tiny import tiny

QUIET = {"progress": False}
WEIGHT = "visual.transformer.resblocks.0.mlp.c_fc.weight"
BIAS = "transformer.resblocks.0.ln_1.bias"  # which the run's adapters left as it was


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("restore")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(7)
        weights = sf.load_clip("ViT-tiny-8-32").export(folder / "weights")
    train(tiny(folder / "run", weights, folder / "cache"))
    return folder / "run"


@pytest.fixture(scope="module")
def later(run, tmp_path_factory):
    """The safe model after a step in a random direction, in two weights."""
    clip = sf.load(run)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in clip.model.named_parameters():
            if name in (WEIGHT, BIAS):
                weight += 0.3 * torch.randn(weight.shape, generator=generator)
    folder = tmp_path_factory.mktemp("later")
    clip.export(folder)
    return folder


def weights_of(clip):
    return clip.model.state_dict()


def test_nothing_added_is_the_later_model(run, later, tmp_path):
    found = sf.restore(run, later, tmp_path / "out", threshold=1.1, add=0.0, **QUIET)
    after = weights_of(sf.load(later))
    assert all(torch.equal(value, after[name]) for name, value in weights_of(found.model).items())
    assert found.figures["restored"] == found.figures["later"] and len(found.layers) == 2
    assert all(torch.equal(value, after[name]) for name, value in weights_of(sf.load(tmp_path / "out")).items())


def test_below_the_threshold_the_safe_change_is_added(run, later, tmp_path):
    data, images = "scenes:n=12,size=32", "scenes:n=8,size=32"
    found = sf.restore(run, later, tmp_path / "out", data, add=0.5, images=images, **QUIET)
    changed = {layer.name for layer in found.layers if layer.changed}
    assert changed == {WEIGHT} and {layer.name for layer in found.layers if layer.rho < 0.35} == {WEIGHT, BIAS}
    base, safe, after, now = (
        weights_of(clip) for clip in (sf.load(run, dial=0), sf.load(run), sf.load(later), found.model)
    )
    for name, value in now.items():
        expected = after[name] + 0.5 * (safe[name] - base[name]) if name in changed else after[name]
        torch.testing.assert_close(value, expected)
    assert not torch.equal(now[WEIGHT], after[WEIGHT])
    cached = [path.name for path in (run.parent / "cache").glob("embeddings-*.safetensors")]
    sf.restore(run, later, tmp_path / "other", data, add=0.7, **QUIET)
    assert cached == [path.name for path in (run.parent / "cache").glob("embeddings-*.safetensors")]
    assert set(found.figures) == {"safe", "later", "restored"}
    assert set(found.figures["safe"]) == {"unsafe_rate@10", "zero_shot.scenes"} and "of the safe change" in str(found)


def test_the_command_prints_each_layer_and_writes_what_was_done(run, later, tmp_path, capsys):
    words = [str(run), str(later), "--out", str(tmp_path / "out"), "--add", "0.25", "--threshold", "1.1", "--quiet"]
    assert main(words) == 0
    printed = capsys.readouterr().out
    assert printed.count(", safe change added\n") == 1 and BIAS in printed and "in 1 of 2 changed weights" in printed
    written = json.loads((tmp_path / "out" / "restore.json").read_text())
    assert written["format"] == RESTORE_FORMAT and not list(misfits(written, restore_shape(written), "it"))
    assert written["add"] == 0.25 and {layer["name"]: layer["changed"] for layer in written["layers"]} == {
        WEIGHT: True,
        BIAS: False,
    }
    assert (tmp_path / "out" / "layers.png").stat().st_size > 1000
    assert main(words) == 2 and "holds files already" in capsys.readouterr().err
    words[3] = str(tmp_path / "other")
    assert main([*words, "data.nothing=1"]) == 2 and "data.nothing" in capsys.readouterr().err, "options may come last"


def test_nothing_that_is_there_is_replaced(run, later, tmp_path):
    for folder in (later, run, run / "final"):
        before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        with pytest.raises(FileExistsError, match="holds files already"):
            sf.restore(run, later, folder, add=0.5, **QUIET)
        assert before == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    (tmp_path / "empty").mkdir()
    assert sf.restore(run, later, tmp_path / "empty", add=0.5, **QUIET).out == tmp_path / "empty"


@pytest.mark.parametrize("edge", [0.001, 0.3, 0.77, 1.0])
def test_the_least_that_is_enough_is_found(edge):
    asked = []

    def rate(part):
        asked.append(part)
        return 0.1 if part >= edge else 0.5

    add = _least(rate, safe=0.1, later=0.5, take_back=0.75)
    assert 0 <= add - edge <= 2**-STEPS and len(asked) == STEPS + 1


def test_what_cannot_be_restored_is_said(run, later, tmp_path):
    for add in (None, 0.5):
        with pytest.raises(ConfigError, match="nothing to put back: the weights"):
            sf.restore(run, run, tmp_path / "out", add=add, **QUIET)
    with pytest.raises(ConfigError, match="nothing to put back: an unsafe item"):
        _least(lambda part: 0.5, safe=0.5, later=0.5, take_back=0.75)
    broken = sf.load(later)
    broken.model.visual.proj.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"NaN or Inf, first in visual\.proj"):
        sf.restore(run, broken, tmp_path / "out", add=0.5, **QUIET)
    with pytest.raises(ConfigError, match=r"raise --threshold \(above 1 it takes every layer\)"):
        _least(lambda part: 0.5, safe=0.1, later=0.5, take_back=0.75)
    with pytest.raises(ConfigError, match=r"is no run: give the folder of the run that made the model safe"):
        sf.restore(later, later, tmp_path / "out", **QUIET)
    with pytest.raises(ValueError, match="different models"):
        sf.restore(run, "RN-small-32,", tmp_path / "out", add=0.5, **QUIET)
    for wrong in ({"threshold": 0}, {"add": -1}, {"add": float("inf")}, {"take_back": 0}):
        with pytest.raises(ValueError, match=next(iter(wrong)).replace("_", "-")):
            sf.restore(run, later, tmp_path / "out", **wrong, **QUIET)
    assert not (tmp_path / "out" / "restore.json").exists()


def test_a_later_model_that_computes_otherwise_with_the_same_weights_is_refused(run, later, tmp_path):
    other = sf.load(later)
    for block in other.model.transformer.resblocks:
        block.mlp.gelu = open_clip.transformer.QuickGELU()
    with pytest.raises(ConfigError, match=r"not the run's with other weights: behavior \(text 1 by"):
        sf.restore(run, other, tmp_path / "out", add=0.5, **QUIET)
    other = sf.load(later)
    other.config["preprocess_cfg"] = {**other.preprocessing, "mean": (0.0, 0.0, 0.0)}
    with pytest.raises(ConfigError, match=r"preprocessing \(mean "):
        sf.restore(run, other, tmp_path / "out", add=0.5, **QUIET)
