"""A folder with a Hugging Face CLIPModel, given to training by its path: it trains, and its run is exported."""

import json
import warnings

import pytest
import torch

from saferclip_fast.export.formats import export
from saferclip_fast.export.huggingface import save_hf
from saferclip_fast.models import load_clip
from saferclip_fast.sources import load_source
from saferclip_fast.train import train


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        clip = load_clip("ViT-tiny-8-32")
    place = tmp_path_factory.mktemp("hugging") / "my-clip"
    save_hf(clip, place)
    return place


@pytest.mark.parametrize("scheme", ["", "local-dir:"])
def test_a_folder_of_a_hugging_face_clip_trains_and_its_run_is_exported(folder, tiny, tmp_path, scheme):
    run_dir = tmp_path / "run"
    # model.pretrained as it is where nobody says it
    words = (f"model.name={scheme}{folder}", "model.pretrained=openai", "train.epochs=1")
    train(tiny(run_dir, *words))
    source = load_source(run_dir)
    differences = export(source, ["open_clip", "huggingface", "peft"], tmp_path / "out")
    assert set(differences) == {"open_clip", "huggingface", "peft"}
    images, tokens = torch.randn(2, 3, 32, 32), source.clip.tokenizer(["a dog", "a cat"])
    with torch.no_grad():
        frozen, tuned = source.frozen()(images, tokens), source.clip(images, tokens)
        theirs = load_source(folder).clip(images, tokens)
    assert all(torch.equal(a, b) for a, b in zip(frozen, theirs, strict=True)), "trained from the folder's weights"
    assert not torch.equal(frozen[0], tuned[0])


def test_resuming_finds_the_folder_again(folder, tiny, tmp_path):
    config = (f"model.name={folder}", "model.pretrained=openai", "train.epochs=1")
    train(tiny(tmp_path / "run", *config))
    assert train(tiny(tmp_path / "run", *config, "resume=auto")).progress.finished


def test_a_folder_that_is_no_model_is_refused_in_one_line(tiny, tmp_path, folder):
    def told(name, *more):
        with pytest.raises((OSError, ValueError)) as error:
            train(tiny(tmp_path / "run", f"model.name={name}", "model.pretrained=openai", *more))
        assert "\n" not in str(error.value)
        return str(error.value)

    empty = tmp_path / "empty"
    empty.mkdir()
    assert f"{empty} is no open_clip folder" in told(empty) and "is no open_clip folder" in told(f"local-dir:{empty}")
    assert "there is no folder some/where" in told("some/where") and "hf-hub:some/where" in told("some/where")
    (empty / "config.json").write_text(json.dumps({"model_type": "blip"}))
    assert "holds a 'blip' model, only a CLIPModel" in told(empty)
    assert "has weights of its own" not in told(empty)
    weights = folder / "model.safetensors"
    assert "is a folder with weights of its own" in told(folder, f"model.pretrained={weights}")
    bare = tmp_path / "bare"
    load_clip(str(folder)).export(bare)
    (bare / "open_clip_model.safetensors").unlink()
    assert f"{bare} holds no weights" in told(bare)


def test_the_folder_of_a_run_says_where_its_model_is(folder, tiny, tmp_path):
    load_clip(str(folder)).export(tmp_path / "run" / "final")
    with pytest.raises(FileNotFoundError, match=r"it is a run, whose tuned model is .*run/final"):
        train(tiny(tmp_path / "other", f"model.name={tmp_path / 'run'}", "model.pretrained=openai"))
