"""Safety put back after a later fine-tuning: from Python and by the command, and what it refuses."""

import json
import warnings

import pytest
import torch

import saferclip_fast as sf
from saferclip_fast.config import ConfigError
from saferclip_fast.restore.__main__ import main
from saferclip_fast.restore.call import STEPS, _largest
from saferclip_fast.train import train
from tests.support.tiny import tiny

QUIET = {"progress": False}


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
            if name in ("visual.transformer.resblocks.0.mlp.c_fc.weight", "transformer.resblocks.0.ln_1.bias"):
                weight += 0.3 * torch.randn(weight.shape, generator=generator)
    folder = tmp_path_factory.mktemp("later")
    clip.export(folder)
    return folder


def weights_of(clip):
    return clip.model.state_dict()


def test_every_layer_moved_back_wholly_is_the_safe_model(run, later, tmp_path):
    found = sf.restore(run, later, tmp_path / "out", threshold=1.1, keep=0.0, **QUIET)
    safe = weights_of(sf.load(run))
    assert all(torch.equal(value, safe[name]) for name, value in weights_of(found.model).items())
    assert found.figures["restored"] == found.figures["safe"] and len(found.layers) == 2
    assert all(torch.equal(value, safe[name]) for name, value in weights_of(sf.load(tmp_path / "out")).items())


def test_what_lies_outside_the_threshold_stays(run, later, tmp_path):
    found = sf.restore(
        run, later, tmp_path / "out", "scenes:n=12,size=32", keep=0.5, images="scenes:n=8,size=32", **QUIET
    )
    rho = {layer.name: layer.rho for layer in found.layers}
    back = {layer.name for layer in found.layers if layer.moved_back}
    assert back == {name for name, value in rho.items() if value < 0.35} and back
    safe, after, now = (weights_of(clip) for clip in (sf.load(run), sf.load(later), found.model))
    for name, value in now.items():
        expected = (safe[name] + after[name]) / 2 if name in back else after[name]
        torch.testing.assert_close(value, expected)
    assert set(found.figures) == {"safe", "later", "restored"}
    assert set(found.figures["safe"]) == {"unsafe_rate@10", "zero_shot.scenes"} and "moved back" in str(found)


def test_the_command_prints_each_layer_and_writes_what_was_done(run, later, tmp_path, capsys):
    words = [str(run), str(later), "--out", str(tmp_path / "out"), "--keep", "0.25", "--threshold", "1.1", "--quiet"]
    assert main(words) == 0
    printed = capsys.readouterr().out
    assert printed.count(", moved back\n") == 2 and "transformer.resblocks.0.ln_1.bias" in printed
    written = json.loads((tmp_path / "out" / "restore.json").read_text())
    assert written["keep"] == 0.25 and [layer["moved_back"] for layer in written["layers"]] == [True, True]
    assert (tmp_path / "out" / "layers.png").stat().st_size > 1000
    assert main(words) == 2 and "holds a restored model already" in capsys.readouterr().err


@pytest.mark.parametrize("edge", [0.0, 0.3, 0.77, 0.999])
def test_the_largest_part_that_is_safe_enough_is_found(edge):
    asked = []

    def rate(part):
        asked.append(part)
        return 0.1 if part <= edge else 0.5

    keep = _largest(rate, safe=0.1, later=0.5, take_back=0.75)
    assert 0 <= edge - keep <= 2**-STEPS and len(asked) == STEPS + 1


def test_what_cannot_be_restored_is_said(run, later, tmp_path):
    with pytest.raises(ConfigError, match="nothing to put back"):
        sf.restore(run, run, tmp_path / "out", **QUIET)
    with pytest.raises(ConfigError, match=r"raise --threshold \(above 1 it takes every layer\)"):
        _largest(lambda part: 0.5, safe=0.1, later=0.5, take_back=0.75)
    with pytest.raises(ConfigError, match=r"is no run: give the folder of the run that made the model safe"):
        sf.restore(later, later, tmp_path / "out", **QUIET)
    with pytest.raises(ValueError, match="different models"):
        sf.restore(run, "RN-small-32,", tmp_path / "out", keep=0.5, **QUIET)
    for wrong in ({"threshold": 0}, {"keep": 1.5}, {"take_back": 0}):
        with pytest.raises(ValueError, match=next(iter(wrong)).replace("_", "-")):
            sf.restore(run, later, tmp_path / "out", **wrong, **QUIET)
    assert not (tmp_path / "out" / "restore.json").exists()
