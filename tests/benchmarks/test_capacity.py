"""The capacity table of docs/scale.md is what its formula gives, and the formula counts what the models have."""

from pathlib import Path

import open_clip
import pytest
import torch

from benchmarks.memory import capacity

ROOT = Path(__file__).parents[2]


def test_documented_table_is_the_formulas():
    assert capacity.table() in (ROOT / "docs" / "scale.md").read_text(encoding="utf-8"), (
        "docs/scale.md has another table than `python -m benchmarks.memory.capacity` prints"
    )


@pytest.mark.parametrize("name", capacity.MODELS)
def test_formula_counts_the_models_weights(name):
    config = open_clip.get_model_config(name)
    with torch.device("meta"):
        model = open_clip.CLIP(**{k: config[k] for k in ("embed_dim", "vision_cfg", "text_cfg")})
    counted = sum(tower.weights for tower in capacity.towers(name))
    assert counted == pytest.approx(sum(p.numel() for p in model.parameters()), rel=0.005)


def test_formula_counts_the_adapters():
    from saferclip_fast.models import load_clip
    from saferclip_fast.models.lora import add_lora, lora_layers

    with pytest.warns(UserWarning, match="random weights"):
        clip = load_clip("ViT-tiny-8-32")
    add_lora(clip.model, capacity.RANK, 16, 0, ["in_proj", "out_proj", "c_fc", "c_proj"])
    trained = sum(p.numel() for p in clip.parameters() if p.requires_grad)
    assert lora_layers(clip.model) and trained == sum(tower.adapters for tower in capacity.towers("ViT-tiny-8-32"))


def test_operations_of_vit_b_32_are_the_published_ones():
    image, _ = capacity.towers("ViT-B-32")
    assert image.flops / 2 == pytest.approx(4.4e9, rel=0.02)  # multiply-adds, in open_clip's model profile


def test_more_gpus_take_less_time_but_for_the_exchange():
    alone, many = (capacity.predict("ViT-L-14", gpus)["epoch_minutes"] for gpus in (1, 64))
    assert alone / 64 < many < alone / 50
