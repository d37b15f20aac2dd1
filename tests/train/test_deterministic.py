"""train.deterministic: every op of a step has a deterministic kernel, or the run stops and says which has none."""

import pytest
import torch

from saferclip_fast.config import ConfigError
from saferclip_fast.train import Trainer, train


def test_torch_is_strict_in_a_step(tiny, tmp_path, monkeypatch):
    """Not warn_only: with it the backward pass of attention on a GPU stays non-deterministic."""
    step, seen = Trainer.step, []

    def watched(self, batch):
        strict = torch.are_deterministic_algorithms_enabled()
        seen.append(strict and not torch.is_deterministic_algorithms_warn_only_enabled())
        step(self, batch)

    monkeypatch.setattr(Trainer, "step", watched)
    train(tiny(tmp_path, "train.epochs=1"))
    assert seen and all(seen)


def test_an_op_without_a_deterministic_kernel_is_named(tiny, tmp_path, monkeypatch):
    loss = Trainer.loss

    def with_put(self, *arguments):
        out = loss(self, *arguments)
        spare = torch.zeros(3).put_(torch.tensor([1]), torch.tensor([0.0]))  # has none, on the CPU either
        return out._replace(loss=out.loss + spare.sum())

    monkeypatch.setattr(Trainer, "loss", with_put)
    with pytest.raises(ConfigError, match=r"put_ does not have a deterministic.*train\.deterministic=false"):
        train(tiny(tmp_path, "train.epochs=1"))
