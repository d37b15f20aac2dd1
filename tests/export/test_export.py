"""Every format against its own library: the same embeddings, from random weights and from a run with adapters."""

import json
import re
import warnings
from pathlib import Path

import open_clip
import peft
import pytest
import torch
import transformers
import yaml
from PIL import Image

from saferclip_fast.config import load_config
from saferclip_fast.data import open_quadruplets
from saferclip_fast.evaluate import Settings, Task, evaluate
from saferclip_fast.export import FORMATS, ExportError, Unsupported, export, load_source, onnx_files
from saferclip_fast.export.__main__ import main
from saferclip_fast.export.huggingface import hf_tokenizer, save_hf, to_hf
from saferclip_fast.export.model_card import card
from saferclip_fast.export.onnx_files import run_onnx
from saferclip_fast.export.peft_adapter import save_adapter
from saferclip_fast.models import CONFIG_FOLDER, load_clip
from saferclip_fast.models.dial import interpolate
from saferclip_fast.models.lora import lora_layers
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
    with pytest.MonkeyPatch.context() as patch:
        if "quick" in clip.name:  # as of a large model: ONNX weights in files of their own
            patch.setattr(onnx_files, "_ONE_FILE", 0)
        differences = export(load_source(weights), ["open_clip", "huggingface", "onnx"], out)
    assert len(list((out / "onnx").glob("*.data"))) == (2 if "quick" in clip.name else 0)
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


@torch.no_grad()
def test_clip_skip_of_diffusers_finds_the_text_model_with_the_line_that_the_page_has(folder, inputs):
    """What StableDiffusionPipeline.encode_prompt does with clip_skip; transformers 5 has no text_model."""
    line = 'object.__setattr__(encoder, "text_model", encoder)'
    assert line in (Path(__file__).parents[2] / "docs" / "export.md").read_text(encoding="utf-8")
    encoder = transformers.CLIPTextModel.from_pretrained(folder / "huggingface" / "text_model").eval()
    if not hasattr(encoder, "text_model"):
        exec(line)
    out = encoder(inputs[1], output_hidden_states=True)
    found = [encoder.text_model.final_layer_norm(out[-1][-(skip + 1)]) for skip in (0, 1)]
    torch.testing.assert_close(found[0], out.last_hidden_state)
    assert not torch.allclose(found[1], found[0])
    encoder.to(torch.float64)  # no module is its own child


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
    gray_level = 1 / 255 / min(clip.preprocessing["std"])  # the two resize in another order of rounding
    torch.testing.assert_close(found, clip.preprocess(picture), rtol=0, atol=1.1 * gray_level)


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


@pytest.mark.parametrize("words", [["lora.dora=true"], ["lora.init=fisher"], ["lora.dora=true", "lora.init=fisher"]])
def test_peft_adapter_with_dora_or_a_start_of_its_own_at_any_dial(run, tmp_path, words):
    """A fixed start doubles the rank; DoRA's dial is a DoRA adapter again. The export compares with merged weights."""
    words = [*words, "train.ema=0.5", "validation.final=last", "train.epochs=1", f"run_dir={tmp_path / 'run'}"]
    train(load_config(run / "config.yaml", words))
    (tmp_path / "run" / "best.safetensors").unlink()  # so that a checkpoint gives average and start
    tuned, frozen = (load_source(tmp_path / "run", alpha=alpha).clip.exported_state_dict() for alpha in (1, 0))
    assert any((tuned[name] - frozen[name]).abs().max() > 1e-2 for name in frozen)
    for alpha in (1.0, 1.5):
        folder = tmp_path / f"{alpha}"
        assert export(load_source(tmp_path / "run", alpha=alpha), ["peft"], folder)["peft"] < 1e-5
        settings = json.loads((folder / "peft" / "adapter_config.json").read_text())
        assert settings["use_dora"] == ("lora.dora=true" in words)
        assert settings["r"] == (8 if "lora.init=fisher" in words else 4)


def test_a_dora_row_without_a_dial_is_refused_by_name(run):
    source = load_source(run)
    clip = source.frozen().add_lora(4, dora=True)
    layer = next(iter(lora_layers(clip.model).values()))
    with torch.no_grad():
        layer.lora_magnitude_vector["default"].weight[0] *= 0.5
    with pytest.raises(Unsupported, match=r"no dial of 2: export with --format huggingface"):
        save_adapter(source.frozen(), clip, 2.0, None, run.parent / "none")


def test_peft_adapter_of_averaged_weights(run, tmp_path):
    words = ["train.ema=0.9", "validation.final=last", "train.epochs=1", f"run_dir={tmp_path / 'run'}"]
    train(load_config(run / "config.yaml", words))
    (tmp_path / "run" / "best.safetensors").unlink()  # here also the last
    assert export(load_source(tmp_path / "run"), ["peft"], tmp_path / "out")["peft"] < 1e-5
    for file in (tmp_path / "run" / "checkpoints").iterdir():
        file.unlink()
    assert "data hash: not known" in card(load_source(tmp_path / "run"), ["open_clip"], in_subfolders=True)
    with pytest.raises(ValueError, match="holds the adapters that final"):
        export(load_source(tmp_path / "run"), ["peft"], tmp_path / "out", overwrite=True)


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


@torch.no_grad()
def test_all_formats_and_cards_whose_code_runs_as_printed(run, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    assert main([str(run), "--format", "all", "--out", str(out)]) == 0
    assert capsys.readouterr().out.count("differ by at most") == 4
    clip = load_source(run).clip
    image, text = clip(torch.zeros(1, 3, 32, 32), clip.tokenizer(["a dog in the park"]))
    for folder, count in ((out, 4), *((out / name, 1) for name in FORMATS)):
        card = (folder / "README.md").read_text()
        assert "lora.rank: 4" in card and "data hash: `" in card and clip.weights_hash in card
        assert str(run.parent) not in card
        head = yaml.safe_load(card.split("---")[1])
        assert head["pipeline_tag"] == "zero-shot-image-classification" and head["license"] == "other"
        assert head["library_name"] in ("open_clip", "transformers", "peft", "onnx")
        blocks = re.findall(r"^```python\n(.*?)^```", card, re.DOTALL | re.MULTILINE)
        assert len(blocks) == count
        monkeypatch.chdir(folder)
        for block in blocks:
            scope = {}
            exec(block, scope)
            torch.testing.assert_close(torch.as_tensor(scope["text"]), text, **CLOSE)
            torch.testing.assert_close(torch.as_tensor(scope.get("image", image)), image, **CLOSE)


def test_card_shows_the_evaluation_of_these_weights_alone(run):
    tuned, frozen = load_source(run).clip, load_source(run, alpha=0).clip
    task = Task(open_quadruplets("scenes:n=16,size=32,seed=5"))
    result = evaluate(tuned, frozen, task, Settings(str(run.parent / "cache"), resamples=20, progress=False), run)
    entry = result["metrics"][result["key_metrics"][0]]
    try:
        text = card(load_source(run), ["open_clip"], in_subfolders=True)
        row = next(line for line in text.splitlines() if line.startswith(f"| {entry['label']} |"))
        for side, form in (("frozen", ".3f"), ("tuned", ".3f"), ("change", "+.3f")):
            value, low, high = (format(entry[side][key], form) for key in ("value", "low", "high"))
            assert f"| {value} [{low}, {high}] |" in row
        assert row.endswith("| falls |") and "16 held-out quadruplets, 95% intervals" in text
        assert "have not been measured" in card(load_source(run, alpha=0.5), ["open_clip"], in_subfolders=True)
    finally:
        (run / "evaluation.json").unlink()
    assert "have not been measured" in card(load_source(run), ["open_clip"], in_subfolders=True)


@pytest.mark.parametrize(
    "name, pretrained, base",
    [
        ("ViT-L-14-quickgelu", "openai", "openai/clip-vit-large-patch14"),
        ("ViT-L-14", "openai", "peft/base_model"),  # open_clip computes another function with the same weights
        ("ViT-L-14-quickgelu", "laion2b", "peft/base_model"),
    ],
)
def test_card_names_the_base_on_the_hub_where_there_is_one(run, name, pretrained, base):
    source = load_source(run)
    source.config.model.name, source.config.model.pretrained = name, pretrained
    assert f'CLIPModel.from_pretrained("{base}")' in card(source, ["peft"], in_subfolders=True)


def test_one_format_that_fails_leaves_the_others(run, tmp_path, monkeypatch, capsys):
    def broken(source, folder):
        (folder / "half").write_text("x")
        raise OSError(28, "No space left on device")

    monkeypatch.setitem(FORMATS, "peft", FORMATS["peft"]._replace(write=broken))
    words = [str(run), "--out", str(tmp_path), "--format"]
    assert main([*words, "open_clip", "peft", "huggingface"]) == 2
    captured = capsys.readouterr()
    assert "error: peft: [Errno 28] No space left" in captured.err and captured.out.count("differ by at most") == 2
    assert {path.name for path in tmp_path.iterdir()} == {"README.md", "huggingface", "open_clip"}
    sections = re.findall(r"^### (\w+)$", (tmp_path / "README.md").read_text(), re.MULTILINE)
    assert sections == ["open_clip", "huggingface"]
    with pytest.raises(ValueError, match="was made from other weights"):
        export(load_source(run, alpha=0.5), ["open_clip"], tmp_path, overwrite=True)


def test_overwriting_keeps_the_old_folder_until_the_new_one_is_there(run, tmp_path, monkeypatch):
    source, folder = load_source(run), tmp_path / "open_clip"
    export(source, ["open_clip"], tmp_path)
    mark = folder / "mark"
    mark.write_text("old")

    def wrong(source, folder, images, tokens):
        return images.flatten(1)[:, :64], tokens[:, :64].float()

    with monkeypatch.context() as patch:
        patch.setitem(FORMATS, "open_clip", FORMATS["open_clip"]._replace(read=wrong))
        with pytest.raises(ExportError, match="embeddings differ"):
            export(source, ["open_clip"], tmp_path, overwrite=True)
    assert mark.exists() and {path.name for path in tmp_path.iterdir()} == {"README.md", "open_clip"}

    rename = Path.rename

    def killed(path, target):  # after the old folder was set aside
        if path.name.endswith(".partial"):
            raise KeyboardInterrupt
        return rename(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", killed)
        with pytest.raises(KeyboardInterrupt):
            export(source, ["open_clip"], tmp_path, overwrite=True)
        assert main([str(run), "--format", "open_clip", "--out", str(tmp_path), "--overwrite"]) == 130
    with pytest.raises(FileExistsError):  # and has put it back
        export(source, ["open_clip"], tmp_path)
    assert mark.exists()
    export(source, ["open_clip"], tmp_path, overwrite=True)
    assert not mark.exists() and {path.name for path in tmp_path.iterdir()} == {"README.md", "open_clip"}


def test_full_tuning_has_no_adapters_and_takes_the_dial(run, tmp_path, capsys):
    config = load_config(run / "config.yaml", ["model.tuning=full", f"run_dir={tmp_path / 'full'}", "train.epochs=1"])
    train(config)
    out = tmp_path / "out"
    assert main([str(config.run_dir), "--format", "all", "--alpha", "0.5", "--out", str(out)]) == 0
    assert "peft: left out" in (said := capsys.readouterr().err) and "has no adapters" in said
    base, tuned = (load_source(config.run_dir, alpha=alpha).clip.exported_state_dict() for alpha in (0, 1))
    half = open_clip.create_model(f"local-dir:{out / 'open_clip'}").state_dict()
    weight = "token_embedding.weight"
    assert not torch.equal(base[weight], tuned[weight])
    for name, start in base.items():
        torch.testing.assert_close(half[name], start + (tuned[name] - start) / 2, rtol=0, atol=1e-6)


@torch.no_grad()
def test_end_of_text_pooling(clip, tmp_path):
    """By token id both ways, and the legacy id 2 of old converters, which means the largest."""
    config = json.loads((CONFIG_FOLDER / f"{NAME}.json").read_text())
    config["text_cfg"] |= {"pool_type": "eos", "eos_id": 518}  # "the": not the largest id of the texts
    file = tmp_path / f"eos-{clip.name}.json"
    file.write_text(json.dumps(config | {"quick_gelu": "quick" in clip.name}))
    eos = load_clip(str(file))
    eos.model.load_state_dict(clip.model.state_dict())
    tokens = clip.tokenizer(["in the park", "the dog and the cat"])
    wanted, largest = eos.encode_text(tokens), clip.encode_text(tokens)
    assert (wanted - largest).abs().max() > 1e-2

    hf = to_hf(eos)
    assert hf.config.text_config.eos_token_id == 518
    torch.testing.assert_close(hf.get_text_features(tokens).pooler_output[:1], wanted[:1], **CLOSE)
    save_hf(eos, tmp_path / "eos")
    torch.testing.assert_close(load_source(tmp_path / "eos").clip.encode_text(tokens), wanted, **CLOSE)

    save_hf(clip, tmp_path / "legacy")
    settings = json.loads((tmp_path / "legacy" / "config.json").read_text())
    settings["text_config"]["eos_token_id"] = 2
    (tmp_path / "legacy" / "config.json").write_text(json.dumps(settings))
    theirs = transformers.CLIPModel.from_pretrained(tmp_path / "legacy").get_text_features(tokens).pooler_output
    torch.testing.assert_close(theirs, largest, **CLOSE)
    torch.testing.assert_close(load_source(tmp_path / "legacy").clip.encode_text(tokens), largest, **CLOSE)


def test_what_cannot_be_exported_says_what_can(run, folder, tmp_path, capsys):
    with pytest.raises(ValueError, match=r"merged weights only.*give the run's folder"):
        export(load_source(folder / "open_clip"), ["peft"], tmp_path)
    with pytest.raises(ValueError, match="needs the frozen weights"):
        load_source(folder / "open_clip", alpha=0.5)
    with pytest.raises(ValueError, match="say of which model"):
        load_source(folder / "open_clip" / "open_clip_model.safetensors")
    resnet = load_source(load_clip("RN-small-32").export(tmp_path / "resnet").parent)
    with pytest.raises(Unsupported, match=r"ModifiedResNet, not a ViT; .*--format open_clip or onnx"):
        export(resnet, ["huggingface"], tmp_path)
    assert not list(tmp_path.glob(".*")) and not (tmp_path / "huggingface").exists()
    with pytest.raises(FileExistsError, match="pass --overwrite"):
        export(load_source(folder / "open_clip"), ["onnx"], folder)
    assert main([str(tmp_path / "nowhere"), "--format", "onnx", "--out", str(tmp_path)]) == 2
    assert "nowhere not found" in capsys.readouterr().err
