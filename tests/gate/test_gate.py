"""The gate: which inputs keep the frozen embedding, the folder, the figures along the threshold, the command."""

import json
import shutil
import warnings
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import saferclip_fast as sf
from saferclip_fast.config import ConfigError
from saferclip_fast.data import SceneDataset, collate
from saferclip_fast.data.packed_captions import PackedCaptions
from saferclip_fast.embeddings import embed_batch
from saferclip_fast.evaluate import Settings, Task
from saferclip_fast.export import Unsupported
from saferclip_fast.gate import GateError, gate_curve
from saferclip_fast.gate.__main__ import main
from saferclip_fast.gate.curve import table
from saferclip_fast.guard import Guard
from saferclip_fast.guard.figures import at_gate, gate_threshold
from saferclip_fast.results import GATE_CURVE
from saferclip_fast.train import train
from tests.support.tiny import tiny

TEXTS = ["a small red circle", "a gun beside a small red circle", "a large blue square", "a gun"]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def run(weights, tmp_path_factory):
    """A run with a guard, of one epoch over 96 scenes that held out 24."""
    folder = tmp_path_factory.mktemp("gate")
    train(tiny(folder / "run", weights, folder / "cache", "train.epochs=1", "data.val_fraction=0.25"))
    sf.fit_guard(folder / "run", samples=50, progress=False)
    return folder / "run"


@pytest.fixture(scope="module")
def gated(run):
    """A gate that sends some of `batch`, and not others."""
    gated = sf.gate(run)
    images, tokens, _ = inputs(gated)
    halves = {"text": gated.guard.text(gated.guard.clip.encode_text(tokens))}
    halves["image"] = gated.guard.image(gated.guard.clip.encode_image(images))
    return gated.at({name: float(p.median()) for name, p in halves.items()})


def inputs(clip):
    """Images [8, 3, 32, 32], tokens [8, L] and the collated batch that they are of."""
    data = SceneDataset(4, seed=5, size=32, split="test", transform=clip.preprocess)
    batch = collate(clip.tokenizer)([data[i] for i in range(4)])
    width = max(batch["safe_tokens"].shape[1], batch["unsafe_tokens"].shape[1])
    pairs = [
        F.pad(batch[f"{side}_tokens"], (0, width - batch[f"{side}_tokens"].shape[1])) for side in ("safe", "unsafe")
    ]
    return torch.cat([batch["safe_image"], batch["unsafe_image"]]), torch.cat(pairs), batch


# --- what is embedded by which model


@pytest.mark.parametrize("modality", ["text", "image"])
def test_what_is_not_sent_is_frozen_bit_for_bit_and_what_is_sent_is_tuned(gated, modality):
    images, tokens, _ = inputs(gated)
    given = images if modality == "image" else tokens
    encode = f"encode_{modality}"
    frozen, tuned = (getattr(clip, encode)(given) for clip in (gated.guard.clip, gated.tuned))
    over = getattr(gated.guard, modality)(frozen) >= gated.thresholds[modality]
    assert 0 < over.sum() < len(over)
    found = getattr(gated, encode)(given)
    assert torch.equal(found[~over], frozen[~over])
    torch.testing.assert_close(found[over], tuned[over], atol=1e-5, rtol=1e-4)
    assert not (found[over] == frozen[over]).all(-1).any()
    assert torch.equal(gated.sent(modality, frozen), over.nonzero().flatten())
    torch.testing.assert_close(getattr(gated, encode)(given, normalize=True), F.normalize(found, dim=-1))


def test_the_threshold_goes_from_the_tuned_model_to_the_frozen_one(gated):
    images, tokens, _ = inputs(gated)
    for threshold, clip in ((0, gated.tuned), (1, gated.guard.clip)):
        for now, then in zip(gated.at(threshold)(images, tokens), clip(images, tokens), strict=True):
            assert torch.equal(now, then)
    shares = [len(gated.at(t).sent("text", gated.guard.clip.encode_text(tokens))) for t in (0, 0.2, 0.5, 0.8, 1)]
    assert shares == sorted(shares, reverse=True) and (shares[0], shares[-1]) == (8, 0)
    assert len({gated.at(t).weights_hash for t in (0, 0.5, 1)}) == 3 and gated.at(0.5).tuned is gated.tuned


def test_packed_captions_are_gated_as_they_are_alone(gated):
    _, tokens, batch = inputs(gated)
    packed = gated.pack(tokens, [*batch["safe_lengths"], *batch["unsafe_lengths"]])
    assert isinstance(packed, PackedCaptions)
    wanted = torch.tensor([6, 1, 3])
    unpacked = packed.tokens_of(wanted, gated.pad_id)
    assert (
        torch.equal(unpacked, tokens[wanted][:, : unpacked.shape[1]])
        and not tokens[wanted][:, unpacked.shape[1] :].any()
    )
    frozen = gated.guard.clip.encode_text(packed)
    found, sent = gated.encode_text(packed), gated.sent("text", frozen)
    others = torch.ones(8, dtype=torch.bool).index_fill(0, sent, False)
    assert 0 < len(sent) < 8 and torch.equal(found[others], frozen[others])
    torch.testing.assert_close(found[sent], gated.tuned.encode_text(tokens)[sent], atol=1e-5, rtol=1e-4)
    now, before = embed_batch(gated, batch), embed_batch(gated.guard.clip, batch)
    assert any((a == b).all(-1).any() for a, b in zip(now, before, strict=True))


def test_it_is_used_as_an_open_clip_model(gated):
    pixels = torch.stack([gated.preprocess(Image.new("RGB", (40, 30), (i, 90, 30))) for i in range(2)])
    image, text = gated(pixels, gated.tokenizer(TEXTS))
    assert image.shape == (2, 64) and text.shape == (4, 64)
    assert float(gated.logit_scale) == float(gated.guard.clip.model.logit_scale)
    assert not gated.train().training and not any(p.requires_grad for p in gated.parameters())
    pixels.requires_grad_()
    gated.encode_image(pixels).sum().backward()
    assert pixels.grad.abs().sum() > 0, "gradients go through"
    with pytest.raises(ValueError, match="NaN or Inf"):
        gated.encode_image(torch.full((1, 3, 32, 32), float("nan")))


def test_a_modality_that_the_guard_does_not_know_stays_frozen(gated):
    alone = Guard(
        gated.guard.clip, gated.guard.text, None, {"modalities": {"text": gated.guard.figures["modalities"]["text"]}}
    )
    gate, (images, tokens, _) = sf.gate(gated.tuned, alone), inputs(gated)
    assert gate.thresholds["image"] == 1 and gate.thresholds["text"] < 1
    image, text = gate.at(0)(images, tokens)
    assert torch.equal(image, gated.guard.clip.encode_image(images)) and torch.equal(
        text, gated.tuned.encode_text(tokens)
    )


# --- the threshold


def test_the_threshold_lets_all_but_a_half_percent_of_safe_items_pass():
    p = torch.rand(1000, generator=torch.Generator().manual_seed(0))
    unsafe = torch.arange(1000) >= 600
    threshold = gate_threshold(p, unsafe)
    safe = p[:600].sort(descending=True).values
    assert (safe >= threshold).sum() == 3 and safe[3] < threshold <= safe[2], "3 of 600 are a half percent"
    found = at_gate(p, unsafe, threshold)
    assert found["false_alarms"] == pytest.approx(0.005)
    assert found["found"] == pytest.approx(float((p[600:] >= threshold).double().mean()))
    assert gate_threshold(torch.full((400,), 0.3), torch.zeros(400, dtype=torch.bool)) > torch.tensor(0.3)
    certain = torch.ones(9)
    assert gate_threshold(certain, torch.zeros(9, dtype=torch.bool)) == 1
    assert at_gate(certain, torch.arange(9) > 4, 1.0) == {"threshold": 1.0, "found": 0, "false_alarms": 0}


def test_the_guard_chooses_it_on_validation_rows(run):
    gated = sf.gate(run)
    entries = json.loads((run / "guard.json").read_text())["modalities"]
    assert gated.thresholds == {name: entry["gate"]["threshold"] for name, entry in entries.items()}
    assert sf.gate(run, threshold=0.25).thresholds == {"text": 0.25, "image": 0.25}


# --- what does not go together


def test_models_that_do_not_belong_together_are_refused(run, gated):
    guard = gated.guard
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # random weights
        other, trained = sf.load_clip("RN-small-32"), sf.load_clip("ViT-tiny-8-32")
    with pytest.raises(ValueError, match="embeds into"):
        sf.gate(other, guard)
    with pytest.raises(GateError, match="is being trained"):
        sf.gate(trained.add_lora(), guard)
    with pytest.raises(GateError, match="is a gate already"):
        sf.gate(gated, guard)
    tuned = sf.load(run)
    tuned.config = {**tuned.config, "preprocess_cfg": {**tuned.preprocessing, "mean": [0.0, 0.0, 0.0]}}
    with pytest.raises(GateError, match=r"takes other inputs than the guard's frozen model: preprocessing \(mean"):
        sf.gate(tuned, guard)
    with pytest.raises(ValueError, match="leads to no guard: give guard="):
        sf.gate(sf.load(run))
    old = {"modalities": {"text": {}}}
    with pytest.raises(GateError, match="chose no threshold for text"):
        sf.gate(run, Guard(guard.clip, guard.text, None, old))
    for threshold in (-0.1, 1.5, float("nan")):
        with pytest.raises(ValueError, match="is a probability, from 0"):
            sf.gate(run, threshold=threshold)


def test_one_set_of_weights_is_refused_by_name(run, gated, tmp_path):
    refused = {
        "state_dict": lambda: gated.state_dict(),
        "export": lambda: gated.export(tmp_path / "export"),
        "sf.export": lambda: sf.export(gated, tmp_path / "out", ["open_clip", "huggingface"]),
        "dial": lambda: sf.evaluate(gated, "scenes:n=8,size=32", frozen=gated.guard.clip, dial=True, progress=False),
        "fine_tune": lambda: sf.fine_tune(gated, "scenes:n=8,size=32", run_dir=tmp_path / "run"),
    }
    for name, call in refused.items():
        with pytest.raises(GateError, match=r"no one set of weights does: keep it with gated\.save"):
            call()
        assert not list(tmp_path.rglob("*.safetensors")), name
    gated.save(tmp_path / "gate")
    for call in (lambda: sf.load(tmp_path / "gate"), lambda: sf.export(tmp_path / "gate", tmp_path / "out")):
        with pytest.raises(Unsupported, match=r"gate is a gate: .*sf\.load_gate"):
            call()


# --- the folder


def test_a_gate_comes_back_as_it_was_wherever_it_is_copied(gated, tmp_path):
    gated.save(tmp_path / "first")
    again = sf.load_gate(shutil.copytree(tmp_path / "first", tmp_path / "copy"))
    assert (again.thresholds, again.weights_hash, again.name) == (gated.thresholds, gated.weights_hash, gated.name)
    images, tokens, _ = inputs(gated)
    assert all(torch.equal(a, b) for a, b in zip(again(images, tokens), gated(images, tokens), strict=True))
    assert sf.load_gate(tmp_path / "copy", threshold=0.5).thresholds == {"text": 0.5, "image": 0.5}
    with pytest.raises(FileExistsError, match="holds files already"):
        gated.save(tmp_path / "first")
    files = {path.suffix for path in tmp_path.rglob("*") if path.is_file()}
    assert files == {".json", ".safetensors"}


def test_other_parts_than_were_saved_are_refused_with_both_hashes(run, gated, tmp_path):
    folder = gated.save(tmp_path / "gate")
    with pytest.raises(FileNotFoundError, match=r"no gate at .*gate\.json: write one with saferclip gate"):
        sf.load_gate(tmp_path)
    for name, clip, other in (("tuned", gated.tuned, gated.guard.clip), ("frozen", gated.guard.clip, gated.tuned)):
        other.export(folder / name)
        with pytest.raises(
            GateError, match=rf"{name} is {other.weights_hash[:12]}, .* with {clip.weights_hash[:12]}: put"
        ):
            sf.load_gate(folder)
        clip.export(folder / name)
    guard = Guard.read(folder / "guard.safetensors", gated.guard.clip)
    guard.text.calibration += 1
    guard.save(folder / "guard.safetensors")
    with pytest.raises(GateError, match=r"guard\.safetensors is \w{12}, and the gate was saved with"):
        sf.load_gate(folder)
    written = json.loads((folder / "gate.json").read_text())
    for damaged in ("{", "[]", json.dumps({**written, "thresholds": {"text": 2, "image": 0.5}}), json.dumps({})):
        (folder / "gate.json").write_text(damaged)
        with pytest.raises(GateError, match=r"gate\.json is damaged .*make the gate again"):
            sf.load_gate(folder)


# --- figures


def test_evaluate_takes_a_gate(gated):
    found = sf.evaluate(gated, "scenes:n=12,size=32", frozen=gated.guard.clip, samples=20, progress=False)
    ends = [
        sf.evaluate(clip, "scenes:n=12,size=32", samples=20, progress=False)["unsafe_rate@10"].tuned
        for clip in (gated.guard.clip, gated.tuned)
    ]
    assert found["unsafe_rate@10"].frozen == ends[0] and found.json["models"]["tuned"]["name"] == gated.name
    assert found["safe_text_cosine_to_frozen"].tuned.value <= 1


def test_the_curve_counts_what_is_kept_and_what_is_sent(gated, tmp_path):
    data = SceneDataset(12, seed=6, size=32, split="test", mixed=0.5)
    settings = Settings(str(tmp_path / "cache"), resamples=20, progress=False)
    curve = gate_curve(gated, Task(data), settings, tmp_path, thresholds=(1, 0, 0.5))
    assert curve == json.loads((tmp_path / f"{GATE_CURVE}.json").read_text())
    own, tuned, _, frozen = curve["points"]
    assert own["chosen"] and [point["thresholds"]["text"] for point in curve["points"][1:]] == [0, 0.5, 1]
    assert tuned["kept"] == dict.fromkeys(("text", "image"), 0) and tuned["sent"] == dict.fromkeys(("text", "image"), 1)
    assert frozen["kept"] == dict.fromkeys(("text", "image"), 1) and frozen["sent"] == dict.fromkeys(
        ("text", "image"), 0
    )
    data.transform = gated.preprocess
    batch = collate(gated.tokenizer)([data[i] for i in range(12)])
    before = embed_batch(gated.guard.clip, batch)
    for name in ("text", "image"):
        p = [getattr(gated.guard, name)(getattr(before, f"{side}_{name}")) for side in ("safe", "unsafe")]
        unsafe = torch.tensor([getattr(record, f"{name}_is_unsafe") for record in data.records]).bool()
        over = torch.cat(p) >= gated.thresholds[name]
        benign = torch.cat([torch.ones(12, dtype=torch.bool), ~unsafe])
        assert own["kept"][name] == pytest.approx(1 - float(over[benign].double().mean()))
        assert own["sent"][name] == pytest.approx(float(over[~benign].double().mean()))
    shown = table(curve)
    assert "0: tuned" in shown and "chosen, " in shown and shown.count("\n") == 6


# --- the command


def test_the_command_saves_the_gate_and_measures_it(run, tmp_path, capsys):
    out = tmp_path / "out"
    words = [str(run), "--out", str(out), "--quiet", "--device", "cpu", "--images", "scenes:n=8,size=32"]
    assert main(words) == 0
    shown = capsys.readouterr().out
    assert "safe items kept bit for bit" in shown and f"sf.load_gate('{out}')" in shown
    curve = json.loads((out / f"{GATE_CURVE}.json").read_text())
    assert curve["utility"] == "zero_shot" and curve["points"][-1]["kept"] == {"text": 1, "image": 1}
    gated = sf.load_gate(out)
    assert gated.thresholds == sf.gate(run).thresholds
    evaluation = json.loads((out / "evaluation.json").read_text())
    assert evaluation["models"]["tuned"]["weights_hash"] == gated.weights_hash
    assert all((out / f"{GATE_CURVE}.{suffix}").stat().st_size > 1000 for suffix in ("png", "svg"))
    assert main(words) == 2 and "holds files already" in capsys.readouterr().err
    again = [
        str(out),
        "--out",
        str(tmp_path / "again"),
        "--quiet",
        "--threshold",
        "0.5",
        "--data",
        "scenes:n=9,size=32",
    ]
    assert main(again) == 0 and not (tmp_path / "again" / "gate.json").exists()
    assert json.loads((tmp_path / "again" / f"{GATE_CURVE}.json").read_text())["points"][0]["thresholds"]["text"] == 0.5
    assert sf.load_gate(out).thresholds == gated.thresholds, "the gate stays as it is"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--threshold", "1.5"], "--threshold is a probability, from 0"),
        (["--batch-size", "0"], "--batch-size must be at least 1"),
        (["objective.k=3"], "only data.* options"),
        (["--device", "tpu9"], "device='tpu9'"),
        (["data.val_fraction=0"], "nothing to measure on"),
    ],
)
def test_a_mistake_is_one_line(run, tmp_path, capsys, words, message):
    assert main([str(run), "--out", str(tmp_path / "out"), "--quiet", *words]) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_run_without_a_guard_is_told_to_fit_one(run, tmp_path, capsys):
    bare = shutil.copytree(run, tmp_path / "bare", ignore=shutil.ignore_patterns("guard.*"))
    assert main([str(bare), "--out", str(tmp_path / "out")]) == 2
    assert f"has no guard, which a gate asks: fit one with saferclip guard {bare}" in capsys.readouterr().err
    with pytest.raises(FileNotFoundError, match="has no guard"):
        sf.gate(bare)


def test_data_without_anything_unsafe_is_refused(gated, tmp_path):
    data = SceneDataset(6, size=32)
    data.records = [replace(record, unsafe_text_label=0, unsafe_image_label=0) for record in data.records]
    with pytest.raises(ConfigError, match="nothing in these quadruplets is labeled unsafe"):
        gate_curve(gated, Task(data), Settings(str(tmp_path / "cache"), resamples=5, progress=False))
