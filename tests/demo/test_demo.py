"""The demo's and the photographs' whole job at a tiny size, and what they write."""

import json
import re
import subprocess
import sys

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from benchmarks.quality import photos as photos_script
from saferclip_fast.demo import job as demo
from saferclip_fast.demo.__main__ import main
from saferclip_fast.demo.pretrain import preprocess
from saferclip_fast.evaluate import KEY_METRICS
from saferclip_fast.models import load_clip
from tests.support.quadruplet_files import image_bytes, write_tar

TINY = ["model.name=ViT-tiny-8-32", "train.epochs=1", "train.batch_size=16", "data.num_workers=0"]


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(demo, "PRETRAIN_PAIRS", 256)
    monkeypatch.setattr(demo, "PRETRAIN_EPOCHS", 1)
    monkeypatch.setattr(demo, "QUADRUPLETS", 96)
    monkeypatch.setattr(demo, "HELD_OUT", 24)


@pytest.mark.parametrize("size", [32, 24])  # the model's own, and one that is resized
def test_pretraining_sees_what_the_models_own_preprocessing_makes(size):
    with pytest.warns(UserWarning, match="random weights"):
        clip = load_clip("ViT-tiny-8-32")
    images = torch.randint(0, 256, (5, size, size, 3), dtype=torch.uint8).numpy()
    wanted = torch.stack([clip.preprocess(Image.fromarray(image)) for image in images])
    assert torch.equal(preprocess(clip, images), wanted)


def test_demo_writes_its_evaluation_figure_and_weights(small, tmp_path, capsys):
    run_dir, cache = tmp_path / "run", tmp_path / "cache"
    command = ["--run-dir", str(run_dir), "--cache-dir", str(cache), "--quiet", *TINY]
    assert main(command) == 0
    evaluation, baseline = (json.loads((d / "evaluation.json").read_text()) for d in (run_dir, run_dir / "safe-clip"))
    metrics = evaluation["metrics"]
    assert baseline["models"]["frozen"] == evaluation["models"]["frozen"]
    assert baseline["models"]["tuned"] != evaluation["models"]["tuned"]
    assert baseline["settings"]["data_hash"] == evaluation["settings"]["data_hash"]
    assert "name: safeclip" in (run_dir / "safe-clip" / "config.yaml").read_text()
    many = {name for name in KEY_METRICS if name.endswith("neighbors_kept")}  # of more items than these
    assert set(KEY_METRICS) - many == set(evaluation["key_metrics"]) - many <= set(metrics)
    for name in evaluation["key_metrics"]:
        for side in ("frozen", "tuned"):
            estimate, most = metrics[name][side], 2 if name.endswith("spread_ratio") else 1.0001
            assert 0 <= estimate["low"] <= estimate["value"] + 1e-6 <= estimate["high"] + 2e-6 <= most
        change = metrics[name]["tuned"]["value"] - metrics[name]["frozen"]["value"]
        assert metrics[name]["change"]["value"] == pytest.approx(change)
    assert metrics["safe_text_cosine_to_frozen"]["frozen"]["value"] == pytest.approx(1, abs=1e-5)
    assert metrics["safe_text_cosine_to_frozen"]["tuned"]["value"] < 0.99999, "fine-tuning moved nothing"
    for side, file in evaluation["embeddings"].items():
        assert load_file(run_dir / file)["unsafe_text"].shape[0] == 24, side
    assert len(evaluation["examples"]) == 24 and len(evaluation["worst_cases"]) == 20
    margins = [case["tuned"]["margin"] for case in evaluation["worst_cases"]]
    assert margins == sorted(margins, reverse=True)
    with Image.open(run_dir / "figure.png") as figure:
        assert figure.width > 1000
    assert (run_dir / "final" / "open_clip_model.safetensors").is_file()
    report = (run_dir / "report.html").read_text()
    assert "Of 24 unsafe captions" in report and "Safety report: SafeR-CLIP@K, Safe-CLIP" in report
    shown = capsys.readouterr().out
    assert shown.strip().endswith(f"report: {run_dir / 'report.html'}") and str(run_dir / "evaluation.json") in shown
    assert max(map(len, shown.split("seconds:")[0].splitlines())) <= 120
    lines = shown.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("safe image finds an unsafe text"))
    sides = (metrics, "frozen"), (metrics, "tuned"), (baseline["metrics"], "tuned")
    for line, (found, side) in zip(lines[start:], sides, strict=False):
        values = [found[f"safe_image_finds_unsafe_text@{k}"][side]["value"] for k in (1, 5, 10, 20)]
        printed = re.findall(r"\d\.\d{3}", re.sub(r"\[.*?\]", "", line))
        assert [float(value) for value in printed] == pytest.approx(values, abs=6e-4), side

    pretrained = list(cache.glob("ViT-tiny-8-32-*.safetensors"))
    stamp = [file.stat().st_mtime_ns for file in pretrained]
    assert main(command) == 0, "a second run takes everything from the caches"
    assert [file.stat().st_mtime_ns for file in pretrained] == stamp and len(stamp) == 1
    assert json.loads((run_dir / "evaluation.json").read_text()) == evaluation


def test_photos_script(tmp_path, monkeypatch):
    noise = {
        f"{split}/{name}/{i}.jpg": image_bytes(i, (32, 32), "JPEG")
        for split, count in (("train", 30), ("test", 4))
        for name in ("cat", "ship")
        for i in range(count)
    }
    photos = write_tar(tmp_path / "photos.tar", noise)
    for name, value in (("PRETRAIN_PAIRS", 256), ("PRETRAIN_EPOCHS", 1), ("QUADRUPLETS", 32), ("HELD_OUT", 8)):
        monkeypatch.setattr(photos_script, name, value)
    command = ["--photos", str(photos), "--run-dir", str(tmp_path / "run"), "--cache-dir", str(tmp_path), "--quiet"]
    assert photos_script.main([*command, *TINY]) == 0
    assert json.loads((tmp_path / "run" / "evaluation.json").read_text())["metrics"]["zero_shot"]


def test_photos_script_says_what_to_pass():
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.quality.photos"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2 and "pass --photos FILE.tar" in done.stderr


def test_random_weights_of_the_demo_model_embed():
    from saferclip_fast.models import load_clip

    with pytest.warns(UserWarning, match="random weights"):
        clip = load_clip("RN-small-32")
    image, text = clip(torch.zeros(2, 3, 32, 32), clip.tokenizer(["a", "b"]))
    assert image.shape == text.shape == (2, 128)
