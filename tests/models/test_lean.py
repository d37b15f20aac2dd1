"""ClipModel's shortcuts change no embedding and no gradient: compared with open_clip and peft."""

import json
import warnings

import open_clip
import pytest
import torch
from peft.tuners.lora import Linear

import saferclip_fast.models.lora
from saferclip_fast.data.captions import lengths
from saferclip_fast.models import CONFIG_FOLDER, load_clip
from saferclip_fast.models.blocks import LastBlock, LeanQuickGELU
from saferclip_fast.models.lora import AdaptedLinear, lora_layers

TEXTS = ["a", "a blue star on grass under a night sky", "a fish", "a small plain dog by a wall", "two red squares"]


@pytest.fixture(autouse=True)
def quiet():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*random weights.*")
        yield


@pytest.fixture(scope="module")
def name(tmp_path_factory) -> str:
    """A tiny architecture with QuickGELU."""
    config = json.loads((CONFIG_FOLDER / "ViT-tiny-8-32.json").read_text()) | {"quick_gelu": True}
    file = tmp_path_factory.mktemp("models") / "tiny-quick.json"
    file.write_text(json.dumps(config))
    return str(file)


@pytest.fixture
def clip(name):
    torch.manual_seed(0)
    return load_clip(name)


@pytest.fixture
def images():
    return torch.randn(5, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def packed(clip):
    tokens = clip.tokenizer(TEXTS)
    text = clip.pack(tokens, lengths(tokens))
    assert len(text.tokens) < len(TEXTS)
    return text


def test_full_gradients_equal_open_clips(clip, images):
    """Every weight's gradient, through packed captions and last blocks that compute one token."""
    twin = open_clip.create_model(clip.name)
    twin.load_state_dict(clip.exported_state_dict())
    twin.eval()
    clip.unfreeze()
    transformers = clip.model.visual.transformer, clip.model.transformer
    assert all(type(t.resblocks[-1]) is LastBlock for t in transformers)
    assert all(type(block.mlp.gelu) is LeanQuickGELU for t in transformers for block in t.resblocks)
    image, text = clip(images, packed(clip))
    wanted_image, wanted_text = twin.encode_image(images), twin.encode_text(clip.tokenizer(TEXTS))
    torch.testing.assert_close(image, wanted_image, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(text, wanted_text, rtol=1e-5, atol=1e-5)
    (image * text).sum().backward()
    (wanted_image * wanted_text).sum().backward()
    found = {n.replace(".in_proj.", ".in_proj_"): p.grad for n, p in clip.model.named_parameters()}
    for parameter, tensor in twin.named_parameters():
        if parameter != "logit_scale":
            assert (found[parameter] - tensor.grad).norm() <= 1e-5 * tensor.grad.norm(), parameter


def test_packed_captions_equal_plain_ones(clip):
    with torch.no_grad():
        torch.testing.assert_close(clip.encode_text(packed(clip)), clip.encode_text(clip.tokenizer(TEXTS)))


def test_a_text_encoder_that_cannot_be_packed_says_so(clip):
    text = packed(clip)
    clip.trims_text = False
    tokens = clip.tokenizer(TEXTS)
    assert clip.pack(tokens, lengths(tokens)) is tokens
    with pytest.raises(ValueError, match="not causal and cannot read packed captions"):
        clip.encode_text(text)


@pytest.fixture
def results(name, images, monkeypatch):
    """results(layer, dropout, precision) -> embeddings and gradients of a model whose adapters are `layer`."""

    def run(layer, dropout=0.0, precision=None):
        monkeypatch.setattr(saferclip_fast.models.lora, "AdaptedLinear", layer)
        torch.manual_seed(0)
        clip = load_clip(name).add_lora(rank=4, alpha=8.0, dropout=dropout).train()
        assert {type(module) for module in lora_layers(clip.model).values()} == {layer}
        for parameter, tensor in clip.named_parameters():
            if "lora_B" in parameter:
                torch.nn.init.normal_(tensor, std=0.1)
        with torch.autocast("cpu", dtype=precision, enabled=precision is not None):
            image, text = clip(images, packed(clip))
        (image.float() * text.float()).sum().backward()
        return [image, text, *(p.grad for p in clip.parameters() if p.requires_grad)]

    return run


def differences(found, wanted):
    return torch.stack([(x - y).norm() / y.norm() for x, y in zip(found, wanted, strict=True)])


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_adapters_equal_pefts(results, dropout):
    assert differences(results(AdaptedLinear, dropout), results(Linear, dropout)).max() <= 1e-5


def test_adapters_are_as_exact_as_pefts_in_bf16(results):
    exact = results(Linear)
    ours, pefts = (differences(results(layer, 0.0, torch.bfloat16), exact) for layer in (AdaptedLinear, Linear))
    assert pefts.mean() > 1e-3 and ours.mean() <= 1.1 * pefts.mean()


def test_nothing_below_the_first_adapter_is_differentiated(clip, images):
    clip.add_lora(rank=4, targets=["visual.transformer.resblocks.1.mlp.c_fc", "transformer.resblocks.1.mlp.c_fc"])
    below = []
    clip.model.visual.transformer.resblocks[0].register_forward_hook(lambda m, i, out: below.append(out.requires_grad))
    clip(images, packed(clip))
    assert below == [False]
