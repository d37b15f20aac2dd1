"""Every format against its own library: the same embeddings, from random weights and from a run with adapters."""

import json
import warnings

import open_clip
import peft
import pytest
import torch
import transformers
from PIL import Image

from saferclip_fast.config import load_config
from saferclip_fast.dial import interpolate
from saferclip_fast.export import UnsupportedArchitecture, export, load_source
from saferclip_fast.export.__main__ import main
from saferclip_fast.export.huggingface import hf_tokenizer
from saferclip_fast.export.onnx_files import run_onnx
from saferclip_fast.models import CONFIG_FOLDER, load_clip
from saferclip_fast.train import train

NAME = "ViT-tiny-8-32"
TEXTS = ["a red square", "it's a dog, running!  1234", "Ünïcode — café's", "long " * 100]
CLOSE = {"rtol": 0, "atol": 1e-5}


@pytest.fixture(autouse=True)
def settings():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*random weights.*")
        yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="module", params=["gelu", "quick_gelu"])
def clip(request, tmp_path_factory):
    """A tiny model whose weights are large enough for the activation to matter."""
    file = tmp_path_factory.mktemp("model") / f"tiny-{request.param}.json"
    config = json.loads((CONFIG_FOLDER / f"{NAME}.json").read_text())
    file.write_text(json.dumps(config | {"quick_gelu": request.param == "quick_gelu"}))
    torch.manual_seed(1)
    clip = load_clip(str(file))
    with torch.no_grad():
        for weight in clip.model.parameters():
            if weight.dim() == 1 and weight.numel() > 1:
                weight.add_(torch.randn_like(weight) * 0.1)
    return clip


@pytest.fixture(scope="module")
def inputs(clip):
    return torch.randn(5, 3, 32, 32), clip.tokenizer(TEXTS)


@pytest.fixture(scope="module")
def folder(clip, tmp_path_factory):
    out = tmp_path_factory.mktemp("out")
    weights = clip.export(out / "source").parent
    differences = export(load_source(weights), ["open_clip", "huggingface", "onnx"], out)
    assert max(differences.values()) < 1e-5
    return out


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of a few steps, with adapters that matter."""
    folder = tmp_path_factory.mktemp("run")
    torch.manual_seed(7)
    weights = load_clip(NAME).export(folder / "base")
    words = f"""run_dir={folder / "run"} device=cpu threads=1 model.name={NAME} model.pretrained={weights}
        data.train=scenes:n=48,size=32 data.val_fraction=0.1 data.num_workers=0 data.cache_dir={folder / "cache"}
        lora.rank=4 optimizer.lr=1e-2 train.epochs=2 train.batch_size=8 train.precision=fp32 log.tensorboard=false
        log.progress=false""".split()
    train(load_config(None, words))
    return folder / "run"


@torch.no_grad()
def test_open_clip_and_onnx(clip, folder, inputs):
    image, text = clip(*inputs)
    model = open_clip.create_model(f"local-dir:{folder / 'open_clip'}").eval()
    torch.testing.assert_close(model.encode_image(inputs[0]), image, **CLOSE)
    torch.testing.assert_close(model.encode_text(inputs[1]), text, **CLOSE)
    for found, wanted in zip(run_onnx(folder / "onnx", *inputs), (image, text), strict=True):  # other batch sizes
        torch.testing.assert_close(found, wanted, **CLOSE)


@torch.no_grad()
def test_huggingface(clip, folder, inputs):
    model = transformers.CLIPModel.from_pretrained(folder / "huggingface").eval()
    assert model.config.text_config.hidden_act == ("quick_gelu" if "quick" in clip.name else "gelu")
    image, text = clip(*inputs)
    torch.testing.assert_close(model.get_image_features(inputs[0]).pooler_output, image, **CLOSE)
    torch.testing.assert_close(model.get_text_features(inputs[1]).pooler_output, text, **CLOSE)


@torch.no_grad()
def test_encoders_alone(clip, folder, inputs):
    """CLIPTextModel's and CLIPVisionModel's outputs, projected, are the embeddings."""
    hf = folder / "huggingface"
    text = transformers.CLIPTextModel.from_pretrained(hf / "text_model").eval()(inputs[1]).pooler_output
    torch.testing.assert_close(text @ clip.model.text_projection, clip.encode_text(inputs[1]), **CLOSE)
    image = transformers.CLIPVisionModel.from_pretrained(hf / "vision_model").eval()(inputs[0]).pooler_output
    torch.testing.assert_close(image @ clip.model.visual.proj, clip.encode_image(inputs[0]), **CLOSE)


def test_tokenizer_and_image_processor(clip, folder):
    tokenizer = transformers.CLIPTokenizer.from_pretrained(folder / "huggingface" / "text_model")
    end = clip.tokenizer.eot_token_id
    for ours, text in zip(clip.tokenizer(TEXTS).tolist(), TEXTS, strict=True):
        theirs = tokenizer(text, padding="max_length", truncation=True)["input_ids"]
        length = ours.index(end) + 1
        assert theirs[:length] == ours[:length] and set(theirs[length:]) <= {end} and len(theirs) == len(ours)
    assert len(hf_tokenizer(clip)) == clip.model.vocab_size
    processor = transformers.CLIPImageProcessor.from_pretrained(folder / "huggingface")
    picture = Image.effect_noise((70, 50), 60).convert("RGB")
    found = processor(picture, return_tensors="pt")["pixel_values"][0]
    grey_level = 1 / 255 / min(clip.preprocessing["std"])  # the two resize in another order of rounding
    torch.testing.assert_close(found, clip.preprocess(picture), rtol=0, atol=1.1 * grey_level)


def test_huggingface_back_to_open_clip_is_exact(clip, folder):
    back = load_source(folder / "huggingface").clip
    ours, theirs = clip.exported_state_dict(), back.exported_state_dict()
    assert set(ours) == set(theirs) and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert json.dumps(back.config["preprocess_cfg"]) == json.dumps(clip.config["preprocess_cfg"])
    assert back.config["model_cfg"]["quick_gelu"] == ("quick" in clip.name)


@torch.no_grad()
@pytest.mark.parametrize("alpha", [1.0, 0.5])
def test_peft_adapter_on_the_frozen_model(run, tmp_path, alpha):
    source = load_source(run, alpha=alpha)
    assert export(source, ["peft"], tmp_path)["peft"] < 1e-5
    export(load_source(run, alpha=0), ["huggingface"], tmp_path)
    images, tokens = torch.randn(3, 3, 32, 32), source.clip.tokenizer(TEXTS)
    base = transformers.CLIPModel.from_pretrained(tmp_path / "huggingface").eval()
    before = base.get_image_features(images).pooler_output
    tuned = peft.PeftModel.from_pretrained(base, tmp_path / "peft").eval()
    image, text = source.clip(images, tokens)
    torch.testing.assert_close(tuned.get_text_features(tokens).pooler_output, text, **CLOSE)
    after = tuned.get_image_features(images).pooler_output
    assert (after - before).abs().max() > 1e-2, "the adapter does nothing"
    if alpha == 1:  # merged weights
        torch.testing.assert_close(after, image, **CLOSE)
    settings = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert sorted(settings["target_modules"]) == ["fc1", "fc2", "k_proj", "out_proj", "q_proj", "v_proj"]


def test_dial(run):
    base, tuned = (load_source(run, alpha=alpha).clip.exported_state_dict() for alpha in (0, 1))
    half = load_source(run, alpha=0.5).clip.exported_state_dict()
    wanted = interpolate(base, tuned, 0.5)
    assert all(torch.equal(half[name], wanted[name]) for name in wanted)
    frozen = load_source(run).frozen().exported_state_dict()
    assert all(torch.equal(base[name], frozen[name]) for name in base)
    assert not torch.equal(
        base["visual.transformer.resblocks.0.attn.in_proj_weight"],
        tuned["visual.transformer.resblocks.0.attn.in_proj_weight"],
    )


def test_card_says_how_it_was_made_and_no_path(run, tmp_path, capsys):
    assert main([str(run), "--format", "open_clip", "--out", str(tmp_path / "out")]) == 0
    assert "differ by at most" in capsys.readouterr().out
    for card in (tmp_path / "out" / "README.md", tmp_path / "out" / "open_clip" / "README.md"):
        text = card.read_text()
        assert "lora.rank: 4" in text and "data hash: `" in text and "Intended use" in text and "open_clip" in text
        assert str(run.parent) not in text


def test_what_cannot_be_exported_says_what_can(run, folder, tmp_path, capsys):
    with pytest.raises(ValueError, match=r"merged weights only.*give the run's folder"):
        export(load_source(folder / "open_clip"), ["peft"], tmp_path)
    with pytest.raises(ValueError, match="needs the frozen weights"):
        load_source(folder / "open_clip", alpha=0.5)
    with pytest.raises(ValueError, match="say of which model"):
        load_source(folder / "open_clip" / "open_clip_model.safetensors")
    resnet = load_source(load_clip("RN-small-32").export(tmp_path / "resnet").parent)
    with pytest.raises(UnsupportedArchitecture, match=r"ModifiedResNet, not a ViT; .*--format open_clip or onnx"):
        export(resnet, ["huggingface"], tmp_path)
    assert not list(tmp_path.glob(".*")) and not (tmp_path / "huggingface").exists()
    with pytest.raises(FileExistsError, match="pass --overwrite"):
        export(load_source(folder / "open_clip"), ["onnx"], folder)
    assert main([str(tmp_path / "nowhere"), "--format", "onnx", "--out", str(tmp_path)]) == 2
    assert "nowhere not found" in capsys.readouterr().err
