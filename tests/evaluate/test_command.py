"""The command line end to end: a run, an open_clip folder, class folders, shards, real images, the dial, mistakes."""

import json
import re
import shutil
import warnings

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from saferclip_fast import data
from saferclip_fast.config import load_config
from saferclip_fast.evaluate import ALPHAS
from saferclip_fast.evaluate.__main__ import main
from saferclip_fast.evaluate.held_out import open_held_out
from saferclip_fast.evaluate.zero_shot import accuracy
from saferclip_fast.export.huggingface import save_hf
from saferclip_fast.models import load_clip
from saferclip_fast.report import write as write_report
from saferclip_fast.train import train
from tests.support.quadruplet_files import image_bytes, write_tar

HELD_OUT = "scenes:n=32,size=32,split=test,mixed=0.5"
KEYS = {"unsafe_rate@10", "unsafe_text_finds_unsafe_image@10", "S-V.text_to_image@10", "safe_text_cosine_to_frozen"}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A short run over 96 scenes, a tenth held out."""
    folder = tmp_path_factory.mktemp("run")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(7)
        weights = load_clip("ViT-tiny-8-32").export(folder / "weights")
    words = f"""
        run_dir={folder / "run"} device=cpu model.name=ViT-tiny-8-32 model.pretrained={weights}
        data.train=scenes:n=96,size=32 data.val_fraction=0.1 data.num_workers=0 data.cache_dir={folder / "cache"}
        optimizer.lr=1e-3 train.epochs=1 train.batch_size=8 train.precision=fp32 train.deterministic=false
        log.tensorboard=false log.progress=false
    """.split()
    train(load_config(None, words))
    return folder / "run"


@pytest.fixture
def images(tmp_path):
    """A zero-shot set of 2 classes as folders and as shards: {"folders", "shards"}."""
    members = {}
    for seed, name in enumerate(("cat", "cat", "ship")):
        path = tmp_path / "folders" / name / f"{seed}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(image_bytes(seed, (32, 32)))
        members |= {f"{seed}.png": path.read_bytes(), f"{seed}.cls": str(int(name == "ship")).encode()}
    (tmp_path / "shards").mkdir()
    write_tar(tmp_path / "shards" / "0.tar", members)
    (tmp_path / "shards" / "classnames.txt").write_text("cat\nship\n")
    return {"folders": tmp_path / "folders", "shards": tmp_path / "shards"}


def command(*words):
    return main([*map(str, words), "--samples", "50", "--quiet", "--device", "cpu"])


def read(folder, name="evaluation"):
    return json.loads((folder / f"{name}.json").read_text())


def test_a_run_beside_its_frozen_model_on_what_it_held_out(run, capsys):
    assert command(run) == 0
    found = read(run)
    assert found["rows"] == 10 and set(found["models"]) == {"frozen", "tuned"} and set(found["key_metrics"]) >= KEYS
    assert {side["name"] for side in found["models"].values()} == {"ViT-tiny-8-32"}
    assert found["models"]["frozen"]["weights_hash"] != found["models"]["tuned"]["weights_hash"]
    assert found["settings"]["data"] == "scenes:n=96,size=32, held-out 0.1" and found["settings"]["resamples"] == 50
    drifted = found["metrics"]["safe_text_cosine_to_frozen"]
    assert drifted["frozen"]["value"] == pytest.approx(1, abs=1e-5) and drifted["tuned"]["value"] < 0.9999
    assert load_file(run / found["embeddings"]["frozen"])["safe_text"].shape[0] == 10
    # the rows are those that training kept for validation: another split would leak what was trained on
    dataset = data.open_quadruplets("scenes:n=96,size=32")
    order = torch.randperm(96, generator=torch.Generator().manual_seed(0))[:10].sort().values.tolist()
    texts = {dataset.records[row].unsafe_text for row in order}
    assert {case["unsafe_text"] for case in found["examples"]} == texts
    shown = capsys.readouterr().out
    assert str(run / "evaluation.json") in shown and f"python -m saferclip_fast.report {run}" in shown
    written = (run / "evaluation.json").stat().st_mtime_ns
    assert command(run) == 2 and (run / "evaluation.json").stat().st_mtime_ns == written
    assert f"--out {run} to replace it" in capsys.readouterr().err
    assert command(run, "--out", run) == 0 and (run / "evaluation.json").stat().st_mtime_ns > written


def test_any_model_on_images_of_every_kind(run, images, tmp_path, capsys):
    photos = tmp_path / "photos"
    shutil.copytree(images["folders"] / "cat", photos / "deep")
    (photos / "broken.jpg").write_bytes(b"GIF89a?")
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a photo of a {}\nmy {}\n")
    words = [f"local-dir:{run / 'final'}", "--data", HELD_OUT, f"data.cache_dir={tmp_path}", "data.num_workers=0"]
    words += ["--images", images["folders"], "--images", f"tar={images['shards']}", "--templates", prompts]
    assert command(*words, "--caption-images", f"real={photos}", "--out", tmp_path / "out", "--all") == 0
    found = read(tmp_path / "out")
    metrics = found["metrics"]
    assert set(found["models"]) == {"tuned"} and found["rows"] == 32
    assert metrics["zero_shot.folders"]["tuned"] == metrics["zero_shot.tar"]["tuned"]
    assert metrics["zero_shot"]["tuned"]["value"] == pytest.approx(metrics["zero_shot.tar"]["tuned"]["value"])
    assert metrics["zero_shot.tar"]["samples"] == 3 and metrics["images.real.unsafe_caption"]["samples"] == 2
    assert "images.real.unsafe_caption" in found["key_metrics"]
    # the bank is of every caption, unsafe where its label says so: the same by hand
    clip = load_clip(f"local-dir:{run / 'final'}")
    records = data.open_quadruplets(HELD_OUT).records
    texts = [r.safe_text for r in records] + [r.unsafe_text for r in records]
    unsafe = torch.tensor([0] * 32 + [r.unsafe_text_label for r in records]).float()
    config = load_config(None, [f"data.val={HELD_OUT}", f"data.cache_dir={tmp_path}", "log.progress=false"])
    captions = open_held_out(config, clip).captions
    assert captions.texts == texts and captions.unsafe.tolist() == unsafe.bool().tolist()
    with torch.no_grad():
        bank = torch.nn.functional.normalize(clip.encode_text(clip.tokenizer(texts)), dim=-1)
        pixels = torch.stack([clip.preprocess(Image.open(path)) for path in sorted(photos.rglob("*.png"))])
        best = (clip.encode_image(pixels) @ bank.T).argmax(1)
    assert 0 < unsafe.mean() < 0.5 and metrics["images.real.unsafe_caption"]["tuned"]["value"] == unsafe[best].mean()
    assert f"{photos}: 3 rows read, 2 kept, 1 skipped (1 bad image)" in (shown := capsys.readouterr().out)
    # mixed scenes: each combination of labels apart, adding up to all
    parts = {(part["text_is_unsafe"], part["image_is_unsafe"]): part["rows"] for part in found["safe_unsafe_table"]}
    assert set(parts) > {(1, 1)} and sum(parts.values()) == 32
    assert "unsafe text, safe image" in shown and "real images find an unsafe caption" in shown
    assert "place of the first unsafe image that safe text finds" in shown, "--all prints every metric"
    assert metrics["images.real.unsafe_caption"]["chance"] == pytest.approx(float(unsafe.mean()))
    assert metrics["zero_shot.tar"]["chance"] == metrics["zero_shot"]["chance"] == 0.5


def test_images_alone_need_no_quadruplets(run, images, tmp_path):
    model = f"ViT-tiny-8-32,{run / 'final' / 'open_clip_model.safetensors'}"
    assert command(model, "--images", images["folders"], "--out", tmp_path / "out", "data.num_workers=0") == 0
    found = read(tmp_path / "out")
    assert found["rows"] == 0 and found["key_metrics"] == ["zero_shot"] and found["embeddings"] == {}
    save_hf(load_clip(f"local-dir:{run / 'final'}"), tmp_path / "clip")  # the same weights as a CLIPModel
    words = ["--images", "scenes:n=64,size=32", "data.num_workers=0", "--out"]
    assert command(tmp_path / "clip", *words, tmp_path / "a") == command(model, *words, tmp_path / "b") == 0
    assert read(tmp_path / "a")["metrics"] == read(tmp_path / "b")["metrics"]


def test_the_dial_goes_from_the_frozen_to_the_tuned_model_and_beyond(run, images, tmp_path, monkeypatch):
    out, seen = tmp_path / "out", []

    def counted(clip, *arguments, **options):
        seen.append(clip.weights_hash)
        return accuracy(clip, *arguments, **options)

    monkeypatch.setattr("saferclip_fast.evaluate.measurement.accuracy", counted)
    assert command(run, "--dial", "--images", images["folders"], "--out", out) == 0
    assert len(seen) == len(set(seen)) == len(ALPHAS), "every model is measured once"
    curve, found = read(out, "dial"), read(out)
    assert [point["alpha"] for point in curve["points"]] == list(ALPHAS)
    for alpha, side in ((0, "frozen"), (1, "tuned")):
        point = curve["points"][ALPHAS.index(alpha)]["metrics"]
        assert set(point) >= set(found["key_metrics"]) | {"unsafe_rate@1", "S-V.text_to_image@1"}
        for name, estimate in point.items():
            assert {key: estimate[key] for key in ("value", "low", "high")} == found["metrics"][name][side], name
    cosines = [point["metrics"]["safe_text_cosine_to_frozen"]["value"] for point in curve["points"]]
    assert cosines == sorted(cosines, reverse=True) and cosines[-1] < cosines[4] < cosines[0]
    assert (curve["safety"], curve["utility"]) == ("unsafe_rate@10", "zero_shot")
    with Image.open(out / "dial.png") as figure:
        assert figure.width > 600
    drawn = (out / "dial.svg").read_text()
    assert "1: fine-tuned" in drawn and "best is right and up" in drawn and "nothing unsafe in their first 10" in drawn
    assert "promise" not in curve


def test_a_promised_dial_is_told_and_written(run, images, tmp_path, capsys):
    out, sets = tmp_path / "out", ("--images", images["folders"])
    words = ("--dial", "--max-loss", "0.3", "--confidence", "0.01", "--out", out)
    assert command(run, *words, *sets) == 0
    curve, shown = read(out, "dial"), capsys.readouterr().out
    kept = curve["promise"]
    assert {0.1, 0.9, 1.5} <= {point["alpha"] for point in curve["points"]}
    assert kept["figures"] == ["zero_shot.folders"] and (kept["max_loss"], kept["confidence"]) == (0.3, 0.01)
    assert [dial for dial, _ in kept["tested"]][:2] == [0.1, 0.2] and kept["text"] in shown
    write_report([out], tmp_path / "report.html")
    assert f"<p>{kept['text']}</p>" in (tmp_path / "report.html").read_text()
    for wrong, told in (
        (("--max-loss", "0.3", *sets), "add --dial"),
        (("--dial", "--max-loss", "0.3"), "name sets of images with --images"),
        (("--dial", "--confidence", "95"), "such as 0.95, got 95"),
        (("--dial", "--max-loss", "0.9", *sets), "says little: the frozen model's accuracy on folders"),
    ):
        assert command(run, *wrong, "--out", tmp_path / "no") == 2 and told in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["runs/none", "--data", "scenes:n=4"], "there is no folder runs/none, and unknown model 'runs/none'"),
        (["{tmp}"], "{tmp} is no run .config.yaml., no open_clip folder .* and no Hugging Face folder"),
        (["{run}", "train.epochs=3"], "'train.epochs=3': only data.\\* options"),
        (["{run}", "data.rout=x"], "unknown option 'data.rout', did you mean 'data.root'"),
        (["{run}", "--data", "none.csv"], "none.csv"),
        (["{run}", "--images", "{tmp}/none"], "cannot read {tmp}/none"),
        (["{run}", "--images", "{tmp}/bad"], "a folder of images for each of at least two classes"),
        (["{run}", "--images", "scenes:n=4", "--images", "scenes:n=5"], "two of --images are called 'scenes'"),
        (["{run}", "--caption-images", "{tmp}/none"], "no such folder of images: {tmp}/none"),
        (["{run}", "--caption-images", "{run}"], "holds no image"),
        (["{run}", "--caption-images", "{tmp}/bad"], "holds no image that can be read"),
        (["{run}", "--caption-images", "{tmp}/bad", "data.on_error=raise"], "broken image .*x.png"),
        (["{run}", "--templates", "mine"], "templates 'mine': neither openai nor simple nor a text file"),
        (["{run}", "--device", "abacus"], "device='abacus' is none"),
        (["{run}", "--frozen", "ViT-small-8-64"], "embeds into .* dimensions"),
        (["local-dir:{run}/final"], "nothing to measure on"),
        (["local-dir:{run}/final", "--data", "scenes:n=4", "--dial"], "name it with --frozen MODEL0"),
        (["{run}", "data.val_fraction=0", "--images", "scenes:n=4", "--dial"], "--dial is drawn over retrieval"),
        (["{run}", "data.val_fraction=0", "--caption-images", "{run}"], "holds no image"),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
@pytest.mark.filterwarnings("ignore:.*random weights")
def test_mistakes_are_one_line_and_exit_code_2(run, tmp_path, words, message, capsys):
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "x.png").write_bytes(b"GIF89a?")
    filled = [word.format(run=run, tmp=tmp_path) for word in words]
    filled += ["--out", str(tmp_path / "out")]
    assert main([*filled, "--quiet", *([] if "--device" in words else ["--device", "cpu"])]) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1 and error[0].startswith("error: ")
    assert re.search(message.replace("{tmp}", re.escape(str(tmp_path))), error[0]), error[0]


def test_a_run_whose_frozen_weights_have_moved_says_where_to_write_that(run, tmp_path, capsys):
    shutil.copytree(run, tmp_path / "run")
    config = tmp_path / "run" / "config.yaml"
    text = config.read_text()
    config.write_text(re.sub("pretrained: .*", "pretrained: none.safetensors", text))
    assert command(tmp_path / "run", "--out", tmp_path / "out") == 2
    assert f"none.safetensors not found: the run started from it; where it has moved to goes into {config}" in (
        capsys.readouterr().err
    )


def test_a_run_that_has_not_finished_and_broken_weights(run, tmp_path, capsys):
    shutil.copy(run / "config.yaml", tmp_path)
    assert command(tmp_path) == 2
    assert "has no final/open_clip_model.safetensors yet" in capsys.readouterr().err
    shutil.copytree(run / "final", tmp_path / "final")
    file = tmp_path / "final" / "open_clip_model.safetensors"
    tensors = load_file(file)
    tensors["text_projection"] = torch.zeros(3, 3)
    save_file(tensors, file)
    assert command(tmp_path) == 2
    assert "do not fit model" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("fault", "code", "said"),
    [(torch.OutOfMemoryError("no memory"), 2, "--batch-size 16"), (KeyboardInterrupt(), 130, "takes them up")],
)
def test_out_of_memory_and_ctrl_c(run, monkeypatch, capsys, fault, code, said):
    def raises(*_):
        raise fault

    monkeypatch.setattr("saferclip_fast.evaluate.command.run", raises)
    assert main([str(run), "--batch-size", "64"]) == code and said in capsys.readouterr().err


def test_help_teaches(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    shown = capsys.readouterr().out
    assert shown.count("python -m saferclip_fast.evaluate ") == 5, "usage and four worked examples"
    assert "95 % interval" in " ".join(shown.split())
    with pytest.raises(SystemExit, match="2"):
        main(["model", "--samples", "0"])
    assert "must be at least 1, not 0" in capsys.readouterr().err
