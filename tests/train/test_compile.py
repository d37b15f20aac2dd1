"""train.compile: the same training, one graph for captions of all lengths."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from saferclip_fast.config import ConfigError
from saferclip_fast.data import SceneDataset, collate
from saferclip_fast.models import load_clip
from saferclip_fast.objectives import ObjectiveOutput
from saferclip_fast.train import train
from saferclip_fast.train.device import compile_encoders
from saferclip_fast.train.step import forward_backward
from tests.train.conftest import log_lines


@pytest.fixture(autouse=True)
def fresh():
    """No graphs of other tests."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.parametrize("adapters", [(), ("lora.dora=true", "lora.init=fisher")])
def test_a_compiled_run_is_the_same_and_is_compiled_once_for_all_captions(tiny, tmp_path, monkeypatch, adapters):
    counter, compile_ = CompileCounterWithBackend("eager"), torch.compile
    monkeypatch.setattr(torch, "compile", lambda call, options, **more: compile_(call, backend=counter, **more))
    words = ["lora.dropout=0", "train.epochs=2", "data.val_fraction=0", "log.every_steps=1", *adapters]
    train(tiny(tmp_path / "compiled", "train.compile=true", *words))
    train(tiny(tmp_path / "plain", *words))
    lines = log_lines(tmp_path / "compiled")
    assert len(lines) == 12 and counter.frame_count == 1
    for found, expected in zip(lines, log_lines(tmp_path / "plain"), strict=True):
        assert found.pop("kind") == expected.pop("kind")
        assert found == pytest.approx(expected, rel=1e-3, abs=1e-5)


def test_inductor_gives_the_same_gradients_with_the_same_dropout(weights):
    """So micro-batches, whose two passes draw the same numbers where nothing is compiled, stay exact."""
    torch.manual_seed(1)
    clip = load_clip("ViT-tiny-8-32", str(weights)).add_lora(rank=4, dropout=0.3).train()
    for name, p in clip.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.1)
    data = SceneDataset(n=24, seed=3)
    batches = [collate(clip.tokenizer)([data[i] for i in rows]) for rows in (range(8), range(8, 20))]

    def gradients():
        torch.manual_seed(2)
        for batch in batches:
            forward_backward(clip, batch, squares)
        found = torch.cat([p.grad.flatten() for p in clip.parameters() if p.requires_grad])
        clip.zero_grad()
        return found, torch.rand(1)

    expected, random_after = gradients()
    compile_encoders(clip)
    counters = torch._dynamo.utils.counters
    counters.clear()
    found, random_after_compiled = gradients()
    assert (found - expected).norm() < 1e-5 * expected.norm()
    assert torch.equal(random_after, random_after_compiled)
    assert not counters["graph_break"] and counters["stats"]["unique_graphs"] == 1


def squares(current):
    return ObjectiveOutput(sum((rows**2).sum() + rows.sum() for rows in current), {})


def test_a_missing_compiler_is_named(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ConfigError, match=r"train.compile=true needs a C\+\+ compiler, and there is no no-such-comp"):
        train(tiny(tmp_path, "train.compile=true"))
