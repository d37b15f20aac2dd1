"""ClipModel against open_clip itself: same embeddings in, same embeddings out, frozen stays frozen."""

import json
import warnings

import open_clip
import pytest
import torch
from huggingface_hub import constants

from saferclip_fast.models import CONFIG_FOLDER, hub, load_clip, loading
from saferclip_fast.models.lora import adaptable_layers, add_lora, lora_layers, merged_state_dict

NAME = "ViT-tiny-8-32"
TEXTS = ["a red square", "a blue star on grass under a night sky", "fish", "a small plain dog by a wall"]


@pytest.fixture(autouse=True)
def quiet_and_seeded():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # fastest at this size
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*random weights.*")
        yield
    torch.set_num_threads(threads)


@pytest.fixture
def clip():
    return load_clip(NAME)


@pytest.fixture
def images():
    return torch.randn(4, 3, 32, 32)


def test_models_of_the_same_text_settings_share_clips_vocabulary_and_nothing_that_a_user_sets(clip, tmp_path):
    assert load_clip(NAME).tokenizer.encoder is clip.tokenizer.encoder
    found = {}
    for folder, length in (("a", 77), ("b", 12), ("c", 12)):
        config = open_clip.get_model_config(NAME)
        config["text_cfg"]["context_length"] = length
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config}))
        found[folder] = loading._tokenizer(f"local-dir:{tmp_path / folder}")
        assert found[folder](TEXTS).shape == (4, length)
    found["b"].context_length = 5
    assert found["c"](TEXTS).shape == (4, 12) and found["c"].encoder is found["b"].encoder


def open_clip_twin(clip, **options):
    model = open_clip.create_model(clip.name, **options)
    model.load_state_dict(clip.exported_state_dict())
    return model.eval()


def train_a_little(clip, images, tokens, steps=3):
    clip.train()
    optimizer = torch.optim.Adam([p for p in clip.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(steps):
        image, text = clip(images, tokens)
        (image * text).sum().backward()
        optimizer.step()
        optimizer.zero_grad()


@torch.no_grad()
def test_embeddings_equal_open_clips(clip, images):
    twin, tokens = open_clip_twin(clip), clip.tokenizer(TEXTS)
    torch.testing.assert_close(clip.encode_image(images), twin.encode_image(images))
    torch.testing.assert_close(clip.encode_text(tokens), twin.encode_text(tokens))


@torch.no_grad()
def test_tokens_cut_to_the_longest_caption_give_the_same_embedding(clip):
    tokens = clip.tokenizer(TEXTS)
    longest = int((tokens != 0).sum(1).max())
    assert longest < tokens.shape[1] // 3
    torch.testing.assert_close(clip.encode_text(tokens[:, :longest]), open_clip_twin(clip).encode_text(tokens))


@torch.no_grad()
@pytest.mark.parametrize("change", [{"no_causal_mask": True}, {"no_causal_mask": True, "pool_type": "last"}])
def test_encoders_that_read_the_padding_get_it_back(tmp_path, change):
    config = json.loads((CONFIG_FOLDER / f"{NAME}.json").read_text())
    config["text_cfg"] |= change
    config["custom_text"] = True
    name = f"padded-{len(change)}"
    (tmp_path / f"{name}.json").write_text(json.dumps(config))
    clip = load_clip(str(tmp_path / f"{name}.json"))
    tokens = clip.tokenizer(TEXTS)
    assert not clip.trims_text
    torch.testing.assert_close(clip.encode_text(tokens[:, :14]), open_clip_twin(clip).encode_text(tokens))


def test_too_many_tokens_is_an_error(clip):
    with pytest.raises(ValueError, match="length 78, ViT-tiny-8-32 reads at most 77"):
        clip.encode_text(torch.zeros(1, 78, dtype=torch.long))


def test_lora_starts_as_the_frozen_model_and_leaves_it_intact(clip, images):
    tokens = clip.tokenizer(TEXTS)
    before = [e.clone() for e in clip(images, tokens)]
    base = {name: t.clone() for name, t in clip.exported_state_dict().items()}
    clip.add_lora(rank=4)
    assert all(torch.equal(a, b) for a, b in zip(clip(images, tokens), before, strict=True))
    train_a_little(clip, images, tokens)
    moved = clip(images, tokens)
    assert all((a - b).abs().max() > 0.01 for a, b in zip(moved, before, strict=True))
    with clip.frozen():
        assert all(torch.equal(a, b) for a, b in zip(clip(images, tokens), before, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(clip(images, tokens), moved, strict=True)), "adapters back on"
    state = {n.replace("base_layer.", ""): t for n, t in clip.model.state_dict().items() if "lora_" not in n}
    for name, tensor in base.items():
        packed = name.replace("in_proj_weight", "in_proj.weight").replace("in_proj_bias", "in_proj.bias")
        assert torch.equal(state[packed], tensor), f"{name} moved"


def test_lora_reaches_every_projection_of_both_encoders(clip, images):
    clip.add_lora(rank=4)
    layers = lora_layers(clip.model)
    per_block = ("attn.in_proj", "attn.out_proj", "mlp.c_fc", "mlp.c_proj")
    blocks = [f"{tower}transformer.resblocks.{i}" for tower in ("visual.", "") for i in (0, 1)]
    assert set(layers) == {f"{block}.{name}" for block in blocks for name in per_block}
    image, text = clip(images, clip.tokenizer(TEXTS))
    (image * text).sum().backward()
    for name, layer in layers.items():
        assert layer.lora_B["default"].weight.grad.abs().max() > 0, f"{name} has no gradient"
    trainable = sum(p.numel() for p in clip.parameters() if p.requires_grad)
    assert trainable == 4 * 4 * (64 + 192 + 64 + 64 + 64 + 256 + 256 + 64)  # blocks * rank * (in + out of each layer)


def test_lora_is_w_plus_scaled_b_a(clip):
    clip.add_lora(rank=4, alpha=2.0, targets=["c_fc"])
    name, layer = next(iter(lora_layers(clip.model).items()))
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    torch.nn.init.normal_(b)
    expected = layer.get_base_layer().weight + (2.0 / 4) * b @ a
    torch.testing.assert_close(merged_state_dict(clip.model)[f"{name}.weight"], expected)


def test_lora_keeps_the_base_in_evaluation_mode(clip):
    clip.add_lora(rank=4, dropout=0.5)
    clip.train()
    dropouts = [layer.lora_dropout["default"] for layer in lora_layers(clip.model).values()]
    assert all(d.training for d in dropouts)
    assert not clip.model.training and not clip.model.visual.transformer.training
    clip.eval()
    assert not any(d.training for d in dropouts)


@pytest.mark.parametrize("tuning", ["lora", "full"])
def test_exported_weights_load_in_open_clip(clip, images, tmp_path, tuning):
    tokens = clip.tokenizer(TEXTS)
    clip.add_lora(rank=4) if tuning == "lora" else clip.unfreeze()
    train_a_little(clip, images, tokens)
    clip.eval()
    file = clip.export(tmp_path)
    with torch.no_grad():
        for loaded in (
            open_clip.create_model(NAME, pretrained=str(file)).eval(),
            open_clip.create_model(f"local-dir:{tmp_path}").eval(),
            load_clip(NAME, str(file)),
            load_clip(f"local-dir:{tmp_path}"),
        ):
            torch.testing.assert_close(loaded.encode_image(images), clip.encode_image(images))
            torch.testing.assert_close(loaded.encode_text(tokens), clip.encode_text(tokens))


def test_full_tuning_keeps_a_twin_only_on_request(clip, images):
    tokens = clip.tokenizer(TEXTS)
    before = [e.clone() for e in clip(images, tokens)]
    clip.unfreeze()
    with pytest.raises(RuntimeError, match=r"keep_frozen=True.*embed_quadruplets"), clip.frozen():
        pass
    clip.unfreeze(keep_frozen=True)
    assert sum(1 for _ in clip.parameters()) == sum(1 for _ in clip.model.parameters()), "the twin is not trained"
    train_a_little(clip, images, tokens)
    with clip.frozen():
        assert all(torch.equal(a, b) for a, b in zip(clip(images, tokens), before, strict=True))
    assert not torch.equal(clip.encode_image(images), before[0])


def test_full_tuning_trains_all_but_the_logit_scale(clip):
    clip.unfreeze()
    assert [n for n, p in clip.model.named_parameters() if not p.requires_grad] == ["logit_scale"]


def test_weights_hash_follows_weights_and_architecture(clip, tmp_path):
    file = clip.export(tmp_path)
    assert load_clip(NAME, str(file)).weights_hash == clip.weights_hash
    config = json.loads((CONFIG_FOLDER / f"{NAME}.json").read_text())
    config["quick_gelu"] = True
    (tmp_path / "tiny-quick.json").write_text(json.dumps(config))
    assert load_clip(str(tmp_path / "tiny-quick.json"), str(file)).weights_hash != clip.weights_hash
    with torch.no_grad():
        clip.model.visual.proj[0, 0] += 1e-3
    assert load_clip(NAME, str(clip.export(tmp_path))).weights_hash != clip.weights_hash


def test_wrong_names_and_files(tmp_path, clip):
    with pytest.raises(ValueError, match="unknown model 'ViT-L-14-quikgelu', did you mean 'ViT-L-14-quickgelu'"):
        load_clip("ViT-L-14-quikgelu")
    with pytest.raises(ValueError, match="unknown tag 'openia' for ViT-L-14, did you mean 'openai'"):
        load_clip("ViT-L-14", "openia")
    with pytest.raises(FileNotFoundError, match=r"weights file nowhere/x\.safetensors not found"):
        load_clip(NAME, "nowhere/x.safetensors")
    with pytest.raises(FileNotFoundError, match=r"model config nowhere\.json not found"):
        load_clip("nowhere.json")
    (tmp_path / "half.json").write_text('{"embed_dim": 64, "text_cfg": {}}')
    with pytest.raises(ValueError, match=r"half\.json lacks vision_cfg"):
        load_clip(str(tmp_path / "half.json"))
    for content, message in (("{", r"torn\.json is not JSON"), ("[]", r"torn\.json must be a JSON object, not list")):
        (tmp_path / "torn.json").write_text(content)
        with pytest.raises(ValueError, match=message):
            load_clip(str(tmp_path / "torn.json"))
    (tmp_path / "ViT-B-32.json").write_text((CONFIG_FOLDER / f"{NAME}.json").read_text())
    with pytest.raises(ValueError, match=r"ViT-B-32 is already the name of another model, rename the file"):
        load_clip(str(tmp_path / "ViT-B-32.json"))
    file = clip.export(tmp_path)
    with pytest.raises(ValueError, match=f"weights {file} do not fit model ViT-small-4-32: "):
        load_clip("ViT-small-4-32", str(file))


@pytest.mark.parametrize(
    ("file", "damage"),
    [
        ("open_clip_model.safetensors", lambda content: content[:-9]),
        ("open_clip_model.safetensors", lambda content: b""),
        ("open_clip_config.json", lambda content: content[:99]),
        ("open_clip_config.json", lambda content: b'{"model_cfg": {}}'),
        ("open_clip_config.json", lambda content: content.replace(b"64,", b"null,", 1)),
        ("open_clip_config.json", lambda content: content.replace(b"64,", b"-64,", 1)),
    ],
)
def test_damaged_folders_are_named(tmp_path, clip, file, damage):
    clip.export(tmp_path)
    (tmp_path / file).write_bytes(damage((tmp_path / file).read_bytes()))
    with pytest.raises(ValueError, match=r"whole\?|valid config") as told:
        load_clip(f"local-dir:{tmp_path}")
    assert str(tmp_path) in str(told.value)


def test_failed_download_names_the_remedy(monkeypatch):
    def offline(*_, **__):
        raise OSError("no route to host")

    monkeypatch.setattr(open_clip.factory, "download_pretrained", offline)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "_answers", lambda url: True)
    with pytest.raises(OSError, match=r"could not download openai for ViT-B-32 .*no route to host.*local-dir:FOLDER"):
        load_clip("ViT-B-32", "openai")


def test_wrong_lora_targets(clip):
    with pytest.raises(ValueError, match=r"no layer ends in 'c_fcc', did you mean 'c_fc'\? Choose from: c_fc"):
        clip.add_lora(targets=["c_fcc"])
    with pytest.raises(ValueError, match=r"adds no adapter to the text encoder; this model's layers end in"):
        clip.add_lora(targets=["visual.transformer.resblocks.0.mlp.c_fc"])


def test_a_layers_whole_name_is_that_layer_alone():
    names = {"transformer.resblocks.0.mlp.c_fc", "visual.transformer.resblocks.1.mlp.c_fc"}
    assert set(lora_layers(load_clip(NAME).add_lora(targets=sorted(names)).model)) == names


def test_lora_on_a_resnet_adapts_its_convolutions(tmp_path, images):
    config = json.loads((CONFIG_FOLDER / f"{NAME}.json").read_text())
    config["vision_cfg"] = {"image_size": 32, "layers": [1, 1, 1, 1], "width": 32, "head_width": 32}
    (tmp_path / "resnet-tiny.json").write_text(json.dumps(config))
    resnet = load_clip(str(tmp_path / "resnet-tiny.json"))
    tokens = resnet.tokenizer(TEXTS)
    with torch.no_grad():
        before = resnet(images, tokens)
    resnet.add_lora(rank=4)
    names = [name for name in lora_layers(resnet.model) if name.startswith("visual.")]
    assert "visual.layer1.0.conv2" in names and not any("attnpool" in name for name in names)
    train_a_little(resnet, images, tokens)
    resnet.eval()
    resnet.export(tmp_path / "out")
    with torch.no_grad():
        loaded = open_clip.create_model(f"local-dir:{tmp_path / 'out'}").eval()
        torch.testing.assert_close(loaded.encode_image(images), resnet.encode_image(images))
        assert not torch.allclose(before[0], resnet.encode_image(images))
    with resnet.frozen():
        assert torch.equal(before[0], resnet.encode_image(images)), "batch norm or weights moved"


@torch.no_grad()
@pytest.mark.parametrize("name", ["ViT-small-8-64", "ViT-small-4-32"])
def test_shipped_models(name):
    clip = load_clip(name)
    size = int(name.rsplit("-", 1)[1])
    assert 5e6 < sum(p.numel() for p in clip.parameters()) < 8e6
    image, text = clip(torch.randn(1, 3, size, size), clip.tokenizer(["a"]))
    assert image.shape == text.shape == (1, 192)


SIGLIP = {
    "embed_dim": 64,
    "custom_text": True,
    "init_logit_bias": -10,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 64, "patch_size": 8},
    "text_cfg": {
        "context_length": 16,
        "width": 64,
        "heads": 2,
        "layers": 1,
        "no_causal_mask": True,
        "proj_bias": True,
        "pool_type": "last",
    },
}


@pytest.mark.parametrize("causal", [False, True])
def test_lora_leaves_out_a_text_projection_that_is_a_layer(tmp_path, causal):
    """As of every SigLIP: open_clip multiplies by what is no nn.Linear. All else trains, and is exported."""
    text = SIGLIP["text_cfg"] | ({"no_causal_mask": False, "pool_type": "argmax"} if causal else {})
    (tmp_path / f"sl-like-{causal}.json").write_text(json.dumps(SIGLIP | {"text_cfg": text}))
    clip = load_clip(str(tmp_path / f"sl-like-{causal}.json")).add_lora(4, 4.0)
    images, tokens = torch.randn(2, 3, 32, 32), clip.tokenizer(["a dog", "a cat"])
    image, text = clip(images, tokens)
    (image.sum() + text.sum()).backward()
    trained = {name: p.grad for name, p in clip.model.named_parameters() if p.requires_grad}
    assert trained and all(gradient is not None for gradient in trained.values())
    assert not any("text_projection" in name for name in trained) and any("text." in name for name in trained)
    clip.export(tmp_path / "out")
    model = open_clip.create_model(f"local-dir:{tmp_path / 'out'}").eval()
    torch.testing.assert_close(model.encode_text(tokens), text, rtol=0, atol=1e-5)


def test_lora_leaves_out_attention_that_does_not_call_its_layer():
    """timm's with a bias for q and v alone, as of EVA01-g-14 and EVA02-E-14: it reads qkv.weight."""
    timm = pytest.importorskip("timm")
    visual = timm.models.eva.Eva(img_size=32, patch_size=8, embed_dim=64, depth=1, num_heads=2, num_classes=0)
    assert visual.blocks[0].attn.q_bias is not None
    model = torch.nn.ModuleDict({"visual": visual, "text": torch.nn.Linear(4, 4)})
    names = adaptable_layers(model)
    assert "visual.blocks.0.attn.proj" in names and "visual.blocks.0.attn.qkv" not in names
    add_lora(model, 4, 4.0, 0.0, ["all"])
    visual(torch.randn(1, 3, 32, 32)).sum().backward()
    assert all(p.grad is not None for n, p in visual.named_parameters() if "lora_" in n)


def test_a_tokenizer_that_cannot_be_had_is_named_before_the_weights(tmp_path, monkeypatch):
    """open_clip looks for one on the network where the architecture's file is called siglip."""

    def offline(name):
        raise ImportError("HTTPFileSystem requires aiohttp")

    monkeypatch.setattr(open_clip, "get_tokenizer", offline)
    monkeypatch.setattr(open_clip, "create_model_and_transforms", lambda *a, **k: pytest.fail("came first"))
    (tmp_path / "my-siglip.json").write_text(json.dumps(SIGLIP))
    with pytest.raises(
        OSError, match=r"tokenizer of my-siglip cannot be had \(ImportError: HTTPFile.*local-dir:FOLDER"
    ):
        load_clip(str(tmp_path / "my-siglip.json"))


def test_a_model_without_weights_says_how_to_go_on():
    with pytest.raises(ValueError, match=r"ViT-S-16 has no weights in open_clip.*model.pretrained=\) for random"):
        load_clip("ViT-S-16", "openai")
