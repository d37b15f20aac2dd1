"""DoRA, and adapters with a start of their own: the frozen model at first and whenever it is asked for."""

import itertools
import warnings

import open_clip
import pytest
import torch
from peft.tuners.lora import Conv2d, Linear

import saferclip_fast.models.lora
from saferclip_fast.models import load_clip
from saferclip_fast.models.lora import (
    ADAPTER,
    START_A,
    START_B,
    change,
    gain,
    lora_layers,
    merged_state_dict,
    set_start,
    start_tensors,
)

TEXTS = ["a red square", "a blue star on grass under a night sky", "fish"]
NAMES = ("ViT-tiny-8-32", "RN-small-32")
KINDS = [(dora, start) for dora, start in itertools.product((False, True), repeat=2) if dora or start]


@pytest.fixture(autouse=True)
def quiet_and_seeded():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*random weights.*")
        yield
    torch.set_num_threads(threads)


@pytest.fixture
def inputs():
    return torch.randn(3, 3, 32, 32)


def adapted(name, dora, start):
    """A model with adapters that have not been trained, from starts that matter."""
    clip = load_clip(name).add_lora(4, 8.0, dora=dora, start=start)
    if start:
        for layer in lora_layers(clip.model).values():
            set_start(layer, layer.get_base_layer().weight.detach().flip(0))
    return clip.train()


def trained(clip):
    """Its adapters moved, each in every direction."""
    with torch.no_grad():
        for parameter in clip.parameters():
            if parameter.requires_grad:
                size = 0.2 * parameter.abs().mean().clamp_min(0.1)
                parameter.add_(size * torch.randn_like(parameter))
    return clip


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("dora", "start"), KINDS)
def test_they_start_as_the_frozen_model_and_leave_it_intact(name, dora, start, inputs):
    clip = load_clip(name)
    tokens = clip.tokenizer(TEXTS)
    before = [x.clone() for x in clip(inputs, tokens)]
    weights, digest = clip.model.state_dict(), clip.weights_hash
    clip.add_lora(4, 8.0, dora=dora, start=start)
    if start:
        for layer in lora_layers(clip.model).values():
            set_start(layer, layer.get_base_layer().weight.detach().flip(0))
    assert all(torch.equal(x, y) for x, y in zip(clip(inputs, tokens), before, strict=True))
    assert clip.hash_weights() == digest, "merged before a step, they are the frozen weights bit for bit"
    trained(clip)
    moved = clip(inputs, tokens)
    assert all((x - y).norm() > 0.01 * y.norm() for x, y in zip(moved, before, strict=True))
    with clip.frozen():
        assert all(torch.equal(x, y) for x, y in zip(clip(inputs, tokens), before, strict=True))
    assert all(torch.equal(x, y) for x, y in zip(clip(inputs, tokens), moved, strict=True)), "adapters back on"
    clip.freeze()
    assert clip.model.state_dict().keys() == weights.keys() and clip.hash_weights() == digest


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("dora", "start"), KINDS)
@torch.no_grad()
def test_merged_weights_compute_what_the_adapters_compute(name, dora, start, inputs):
    clip = trained(adapted(name, dora, start)).eval()
    twin = open_clip.create_model(clip.name)
    twin.load_state_dict(clip.exported_state_dict())
    image, text = clip(inputs, clip.tokenizer(TEXTS))
    torch.testing.assert_close(twin.eval().encode_image(inputs), image, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(twin.encode_text(clip.tokenizer(TEXTS)), text, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_dora_is_pefts_with_its_gradients(name, inputs, monkeypatch):
    """Peft's own layers at the same adapters: embeddings, and every gradient."""
    results = []
    for linear, conv in ((None, None), (Linear, Conv2d)):
        with monkeypatch.context() as patch:
            if linear is not None:
                patch.setattr(saferclip_fast.models.lora, "AdaptedLinear", linear)
                patch.setattr(saferclip_fast.models.lora, "AdaptedConv2d", conv)
            torch.manual_seed(1)
            clip = trained(adapted(name, True, False)).eval()
            if linear is not None:
                for layer in lora_layers(clip.model).values():
                    lengths = layer.lora_magnitude_vector[ADAPTER]
                    if isinstance(layer, Conv2d):  # where peft has no vector
                        lengths.weight = torch.nn.Parameter(lengths.weight.detach().view(1, -1, 1, 1))
            image, text = clip(inputs, clip.tokenizer(TEXTS))
            (image.square().sum() + text.square().sum()).backward()
            gradients = [p.grad.flatten() for p in clip.parameters() if p.requires_grad]
            results.append([image.flatten(), text.flatten(), *gradients])
    for ours, pefts in zip(*results, strict=True):
        assert (ours - pefts).norm() <= 1e-4 * pefts.norm()


def test_an_adapter_with_a_start_is_the_difference_of_two_products():
    clip = trained(adapted(NAMES[0], False, True))
    name, layer = next(iter(lora_layers(clip.model).items()))
    a0, b0 = getattr(layer, START_A).double(), getattr(layer, START_B).double()
    a, b = layer.lora_A[ADAPTER].weight.double(), layer.lora_B[ADAPTER].weight.double()
    expected = layer.get_base_layer().weight.double() + 2.0 * ((b0 + b) @ (a0 + a) - b0 @ a0)  # alpha 8, rank 4
    torch.testing.assert_close(merged_state_dict(clip.model)[f"{name}.weight"].double(), expected, rtol=1e-5, atol=1e-6)


def test_dora_rows_have_the_trained_lengths_and_the_adapters_directions():
    clip = trained(adapted(NAMES[0], True, True))
    name, layer = next(iter(lora_layers(clip.model).items()))
    merged = merged_state_dict(clip.model)[f"{name}.weight"]
    lengths = layer.lora_magnitude_vector[ADAPTER].weight.detach()
    torch.testing.assert_close(merged.norm(dim=1), lengths.abs())
    direction = layer.get_base_layer().weight + change(layer)
    cosine = torch.nn.functional.cosine_similarity(merged * lengths.sign()[:, None], direction, dim=1)
    torch.testing.assert_close(cosine, torch.ones_like(cosine))


@torch.no_grad()
def test_a_start_is_the_best_approximation_of_its_rank_whatever_the_scale():
    for name in NAMES:
        clip = load_clip(name).add_lora(4, 8.0, start=True)
        layer = next(iter(lora_layers(clip.model).values()))
        wanted = torch.randn_like(layer.get_base_layer().weight)
        drawn = getattr(layer, START_A).clone()
        assert drawn.abs().max() > 0 and not getattr(layer, START_B).any(), "until then it is LoRA's own"
        set_start(layer, wanted)
        product = 2.0 * getattr(layer, START_B).flatten(1) @ getattr(layer, START_A).flatten(1)
        u, s, v = torch.linalg.svd(wanted.flatten(1), full_matrices=False)
        torch.testing.assert_close(product, (u[:, :4] * s[:4]) @ v[:4], rtol=1e-4, atol=1e-5)
    many = load_clip(NAMES[1]).add_lora(1000, 8.0, start=True)  # more than any layer has
    layer = next(iter(lora_layers(many.model).values()))
    wanted = torch.randn_like(layer.get_base_layer().weight)
    set_start(layer, wanted)
    product = 0.008 * getattr(layer, START_B).flatten(1) @ getattr(layer, START_A).flatten(1)
    torch.testing.assert_close(product, wanted.flatten(1), rtol=1e-4, atol=1e-5)


def test_starts_are_saved_for_the_layers_that_are_trained():
    clip = adapted(NAMES[0], True, True)
    names = start_tensors(clip.model)
    assert len(names) == 2 * len(lora_layers(clip.model)) and names.keys() <= clip.model.state_dict().keys()
    for name, parameter in clip.model.named_parameters():
        if name.startswith("visual."):
            parameter.requires_grad_(False)
    assert start_tensors(clip.model).keys() == {name for name in names if not name.startswith("visual.")}
    assert start_tensors(adapted(NAMES[0], True, False).model) == {}


def test_a_row_of_zeros_stays_one_until_it_is_trained(inputs):
    clip = load_clip(NAMES[0])
    with torch.no_grad():
        clip.model.visual.transformer.resblocks[0].mlp.c_fc.weight[3] = 0
    before = clip.encode_image(inputs)
    clip.add_lora(4, dora=True)
    layer = clip.model.visual.transformer.resblocks[0].mlp.c_fc
    assert gain(layer)[3] == 0 and torch.equal(clip.encode_image(inputs), before)
    clip.encode_image(inputs).square().sum().backward()
    assert all(p.grad.isfinite().all() for p in layer.parameters() if p.requires_grad)
    assert not merged_state_dict(clip.model)["visual.transformer.resblocks.0.mlp.c_fc.weight"][3].any()


def test_dropout_acts_on_the_adapters_of_linear_layers_and_convolutions(inputs):
    """Not on the frozen weight's part: an adapter that adds nothing loses nothing, and one that adds something does."""
    for name in NAMES:
        clip = load_clip(name).add_lora(4, 8.0, dropout=0.5, dora=True, start=True).train()
        with torch.no_grad(), clip.frozen():
            frozen = clip.encode_image(inputs)
        assert torch.equal(clip.encode_image(inputs), frozen)
        trained(clip)
        assert not torch.equal(clip.encode_image(inputs), clip.encode_image(inputs))


def test_bf16_sees_changes_far_smaller_than_the_start():
    """Of the difference of two bf16 products little would be left."""
    clip = adapted(NAMES[0], False, True).eval()
    layer = clip.model.visual.transformer.resblocks[0].mlp.c_fc
    x = torch.randn(50, layer.in_features)
    with torch.no_grad():
        layer.lora_B[ADAPTER].weight.add_(1e-5 * torch.randn_like(layer.lora_B[ADAPTER].weight))
        exact = x @ change(layer).T
        torch.nn.init.zeros_(layer.get_base_layer().weight)
        torch.nn.init.zeros_(layer.get_base_layer().bias)
        with torch.autocast("cpu", torch.bfloat16):
            found = layer(x).float()
    assert (found - exact).norm() <= 0.01 * exact.norm()
