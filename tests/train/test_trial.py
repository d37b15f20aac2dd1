"""The trial step: what does not train is told before anything slow, and nothing of the trial stays."""

import pytest
import torch
from torch import nn

from saferclip_fast.models import load_clip
from saferclip_fast.models.lora import lora_layers
from saferclip_fast.train import train, trainer
from saferclip_fast.train.frozen import Frozen
from saferclip_fast.train.trial import set_trainable, trial_step


class Picky(nn.Module):
    """Calls its layer only if that is an nn.Linear, as open_clip does with a text projection."""

    def __init__(self, width):
        super().__init__()
        self.inner = nn.Linear(width, width)

    def forward(self, x):
        return self.inner(x) if isinstance(self.inner, nn.Linear) else x @ self.inner


@pytest.fixture
def clip(weights):
    return load_clip("ViT-tiny-8-32", str(weights))


@pytest.mark.parametrize("tuning", ["lora", "full"])
def test_a_trial_leaves_the_model_and_the_generator_as_they_were(clip, tiny, tmp_path, tuning):
    config = tiny(tmp_path, f"model.tuning={tuning}")
    before, drawn = {n: t.clone() for n, t in clip.model.state_dict().items()}, torch.get_rng_state()
    trial_step(config, clip)
    assert torch.equal(torch.get_rng_state(), drawn)
    assert not lora_layers(clip.model) and not any(p.requires_grad or p.grad is not None for p in clip.parameters())
    after = clip.model.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[name], before[name]) for name in before)
    set_trainable(config, clip)  # once more, as the run does


@pytest.mark.parametrize(("tuning", "remedy"), [("lora", r"other lora\.targets"), ("full", "model.tuning=lora")])
def test_a_weight_that_takes_no_part_is_named(clip, tiny, tmp_path, tuning, remedy):
    clip.model.visual.spare = nn.Linear(4, 4)
    with pytest.raises(
        ValueError, match=rf"2 trainable weights of ViT-tiny-8-32 take no part .*visual\.spare.*{remedy}"
    ):
        trial_step(tiny(tmp_path, f"model.tuning={tuning}"), clip)


def test_a_layer_that_no_adapter_can_wrap_is_told_before_the_frozen_pass(clip, tiny, tmp_path, monkeypatch):
    clip.model.visual.ln_pre = Picky(64)
    monkeypatch.setattr(
        trainer, "open_for_training", lambda *_: Frozen(clip, type("I", (), {"weights_hash": "0" * 64}))
    )
    monkeypatch.setattr(trainer, "prepare", lambda *_: pytest.fail("the frozen pass came first"))
    with pytest.raises(
        ValueError, match=r"ViT-tiny-8-32 does not take a step with model\.tuning=lora \(TypeError: .*targets"
    ):
        train(tiny(tmp_path / "run"))


def test_batch_norm_in_parts_is_told_before_the_frozen_pass(clip, tiny, tmp_path):
    clip.model.visual.ln_pre = nn.BatchNorm1d(17)
    with pytest.raises(ValueError, match="encoder without batch norm"):
        trial_step(tiny(tmp_path, "model.tuning=full", "train.micro_batch_size=2"), clip)
