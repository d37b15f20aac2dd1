"""--dry-run and --print-config: what a run would be, and nothing of it."""

import math

import pytest
import torch
import yaml

from saferclip_fast import SafeBank
from saferclip_fast.config import flatten, load_config
from saferclip_fast.data import CurriculumSampler
from saferclip_fast.data.curriculum import STAGES
from saferclip_fast.objectives.rank_guard import rank_guards
from saferclip_fast.train.__main__ import main
from saferclip_fast.train.dry_run import _bank_bytes, dry_run, epoch_sizes
from tests.support.tiny import tiny_words


def test_the_plan_is_what_the_run_then_does(undisturbed, weights, cache, tmp_path, capsys):
    assert main([*tiny_words(tmp_path / "run", weights, cache), "--dry-run"]) == 0
    said = capsys.readouterr().out
    steps = max(int(path.stem.split("-")[1]) for path in (undisturbed / "checkpoints").glob("step-*"))
    assert f"steps: {steps} in 3 epochs of batches of 8" in said
    assert "86 quadruplets to train on, 10 held out" in said
    for what in ("model: ViT-tiny-8-32", "memory on cpu:", "disk:", "time: about", "which only a step tells"):
        assert what in said
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("samples", [1, 2, 3, 10, 97])
@pytest.mark.parametrize("curriculum", [True, False])
def test_epochs_have_the_sizes_that_the_sampler_gives(samples, curriculum):
    sampler = CurriculumSampler([0.5] * samples, stages=STAGES if curriculum else (1.0,))
    assert epoch_sizes(samples, 5, curriculum) == [sampler.epoch_size(epoch) for epoch in range(1, 6)]


def test_the_estimate_follows_the_work(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr("saferclip_fast.train.dry_run._time", lambda *_: 1.0)

    def seconds(*words):
        line = dry_run(tiny(tmp_path / "run", "curriculum.enabled=false", "validation.every_epochs=99", *words))[-1]
        number, unit = line.split("about ")[1].split(",")[0].split()
        return float(number) * {"seconds": 1, "minutes": 60, "hours": 3600}[unit]

    # 96 to embed; each epoch 86 samples, three passes a sample
    assert math.isclose(seconds(), 96 + 3 * 3 * 86, rel_tol=0.01)
    assert math.isclose(seconds("train.micro_batch_size=2"), 96 + 4 * 3 * 86, rel_tol=0.01)
    assert math.isclose(seconds("train.epochs=6"), 96 + 3 * 6 * 86, rel_tol=0.01)


@pytest.mark.parametrize(("word", "guarded"), [("objective.name=saferclip", True), ("objective.preset=paper", False)])
def test_the_banks_bytes_are_those_that_it_takes(tiny, tmp_path, word, guarded):
    rows, width = 300, 1024
    bank = SafeBank(*torch.randn(2, rows, width)).pack()
    banks = [bank, *(guard.bank for guard in rank_guards(bank, 0.03))] if guarded else [bank]
    held = sum(part.nbytes for one in banks for part in (one.text, one.image, one.packed))
    assert _bank_bytes(tiny(tmp_path / "run", word), width, rows, bank.device) == pytest.approx(held, rel=0.03)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["objective.k=90"], "objective.k=90 is more than the 86 training samples"),
        (["data.train=scenes:m=3"], "has no option m"),
        (["lora.targets=[c_fq]"], "lora.targets: no layer ends in 'c_fq', did you mean 'c_fc'?"),
        (["model.weights_hash=" + 64 * "0"], "model.weights_hash asks for weights"),
    ],
)
def test_what_would_stop_the_run_stops_the_plan(words, message, weights, cache, tmp_path, capsys):
    assert main([*tiny_words(tmp_path / "run", weights, cache), *words, "--dry-run"]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("error: ") == 1


def test_the_printed_config_is_a_config(tmp_path, capsys):
    words = ["objective.k=3", "data.train=x.csv", "lora.targets=[c_fc,c_proj]", "model.pretrained="]
    assert main(["--config", "paper", *words, "--print-config"]) == 0
    file = tmp_path / "config.yaml"
    file.write_text(capsys.readouterr().out)
    assert yaml.safe_load(file.read_text())["objective"]["k"] == 3
    assert flatten(load_config(file)) == flatten(load_config("paper", words))
    assert main(["objective.k=0", "--print-config"]) == 2
