"""The average of the trained weights: its values, what it is used for, and that a killed run keeps it bit for bit."""

import pytest
import torch
from safetensors.torch import load_file

from saferclip_fast.models import load_clip
from saferclip_fast.train import Trainer, train
from saferclip_fast.train.checkpoint import CheckpointFolder
from saferclip_fast.train.ema import WeightAverage
from tests.train.conftest import final_weights, log_lines, run_child, train_child
from tests.train.test_resume import die_in_step

EMA = "train.ema=0.6"  # reached by the warm-up's decay after 13 of the tiny run's 20 steps


def recursion(weights, decay):
    """The average in float64 of a list of weights [step 0, step 1, ...]."""
    average = weights[0].double()
    for n, x in enumerate(weights[1:], start=1):
        d = min(decay, (1 + n) / (10 + n))
        average = d * average + (1 - d) * x.double()
    return average


def test_average_is_the_recursion():
    torch.manual_seed(0)
    parameters = {"a": torch.nn.Parameter(torch.randn(3, 5)), "b": torch.nn.Parameter(torch.randn(2))}
    average = WeightAverage(parameters, 0.5)
    seen = {name: [p.detach().clone()] for name, p in parameters.items()}
    for step in range(1, 21):  # the warm-up ends at step 8
        for name, p in parameters.items():
            p.data = torch.randn_like(p)
            seen[name].append(p.detach().clone())
        average.update(step)
    for name, weights in seen.items():
        torch.testing.assert_close(average.average[name].double(), recursion(weights, 0.5), rtol=1e-5, atol=1e-6)


def test_applied_gives_the_weights_back_bit_for_bit():
    parameter = torch.nn.Parameter(torch.randn(100))
    average = WeightAverage({"a": parameter}, 0.9)
    parameter.data.add_(torch.randn(100))
    average.update(1)
    own = parameter.detach().clone()
    with pytest.raises(KeyError), average.applied():
        assert torch.equal(parameter, average.average["a"]) and not torch.equal(parameter, own)
        raise KeyError
    assert torch.equal(parameter, own)


@pytest.mark.parametrize("decay", [0, 1, -0.1])
def test_decay_out_of_range(decay):
    with pytest.raises(ValueError, match="between 0 and 1"):
        WeightAverage({}, decay)


def export_of(config, tensors, tmp_path):
    """The weights that a run of `config` exports when its trained tensors are these."""
    clip = load_clip(config.model.name, config.model.pretrained, "cpu")
    clip.add_lora(config.lora.rank, config.lora.alpha, config.lora.dropout, config.lora.targets)
    with torch.no_grad():
        for name, parameter in clip.model.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(tensors[name])
    return load_file(clip.export(tmp_path))


@pytest.mark.parametrize("final", ["last", "best"])
def test_average_is_validated_and_exported_and_not_trained_on(tiny, tmp_path, monkeypatch, final):
    weights, validated = [], []
    step, validate = Trainer.step, Trainer.validate

    def watched_step(self, batch):
        if not weights:
            weights.append({n: p.detach().clone() for n, p in self.state.trainable.items()})
        step(self, batch)
        weights.append({n: p.detach().clone() for n, p in self.state.trainable.items()})

    def watched_validate(self, split):
        validated.append((self.state.progress.step, {n: p.detach().clone() for n, p in self.state.trainable.items()}))
        return validate(self, split)

    monkeypatch.setattr(Trainer, "step", watched_step)
    monkeypatch.setattr(Trainer, "validate", watched_validate)
    plain = tiny(tmp_path / "plain")
    train(plain)
    trained_alone, weights[:], validated[:] = weights[-1], [], []
    config = tiny(tmp_path / "run", EMA, f"validation.final={final}")
    result = train(config)
    assert all(torch.equal(weights[-1][n], trained_alone[n]) for n in trained_alone)

    def expected(steps):
        return {n: recursion([w[n] for w in weights[: steps + 1]], 0.6).float() for n in weights[0]}

    assert len(validated) == 3
    for steps, used in validated:
        torch.testing.assert_close(used, expected(steps), rtol=1e-4, atol=1e-6)
    steps = result.progress.best_step if final == "best" else result.progress.step
    torch.testing.assert_close(
        load_file(result.weights), export_of(config, expected(steps), tmp_path), rtol=1e-4, atol=1e-6
    )
    saved = CheckpointFolder(tmp_path / "run" / "checkpoints", 2).load_newest()
    torch.testing.assert_close({n: saved.tensors[f"ema.{n}"] for n in weights[0]}, expected(20), rtol=1e-4, atol=1e-6)


def test_killed_run_resumes_its_average_bit_for_bit(tiny, tmp_path):
    assert run_child(train_child, tiny(tmp_path / "whole", EMA, "validation.final=last")) == 0
    config = tiny(tmp_path / "killed", EMA, "validation.final=last", "resume=auto")
    assert run_child(die_in_step, config, 11) == -9
    assert run_child(train_child, config) == 0
    assert final_weights(tmp_path / "killed") == final_weights(tmp_path / "whole")
    assert log_lines(tmp_path / "killed") == log_lines(tmp_path / "whole")
