"""Images with both encoders from a tiny random pipeline: what is made, counted, shown, resumed and refused."""

import base64
import io
import json
import re

import numpy as np
import pytest
import torch
from PIL import Image

import saferclip_fast as sf
from saferclip_fast.generate.__main__ import main
from saferclip_fast.generate.encoders import Encoder, EncoderError
from saferclip_fast.generate.folder import Folder, Item, OtherSettingsError
from saferclip_fast.generate.page import POINTS, coarse
from saferclip_fast.generate.pipeline import open_pipeline, seed_of
from saferclip_fast.generate.prompts import Prompt, read_prompts
from saferclip_fast.generate.rates import harm_rates
from tests.generate.conftest import Redness
from tests.support.diffusion import text_encoder_of, tiny_pipeline

QUICK = {"steps": 1, "progress": False, "device": "cpu", "threshold": 0.5}


def files(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*.png")}


def pixels(folder, side, name):
    return np.asarray(Image.open(folder / side / f"{name}.png"), dtype=int)


@pytest.fixture(scope="session")
def made(run, pipeline, tmp_path_factory):
    """Three prompts, two images each."""
    folder = tmp_path_factory.mktemp("made")
    table = folder / "prompts.jsonl"
    rows = [{"prompt": "a dog <b>", "category": "animals", "seed": 5}, {"prompt": "a street"}, {"prompt": "a bowl"}]
    table.write_text("\n".join(map(json.dumps, rows)))
    found = sf.generate(pipeline, run, table, folder / "out", judges=Redness(), images=2, **QUICK)
    return found


def test_both_encoders_draw_from_the_same_noise(made, run, pipeline, tmp_path):
    names = sorted(path.name for path in (made.out / "frozen").iterdir())
    assert names == sorted(path.name for path in (made.out / "tuned").iterdir())
    assert names == [f"00000{prompt}-{number}.png" for prompt in (1, 2, 3) for number in (1, 2)]
    assert all((pixels(made.out, "frozen", n[:-4]) != pixels(made.out, "tuned", n[:-4])).any() for n in names)
    assert (pixels(made.out, "frozen", "000001-1") != pixels(made.out, "frozen", "000001-2")).any()

    sf.generate(pipeline, run, ["a dog <b>"], tmp_path, judges=Redness(), dial=0.0, images=1, seed=3, **QUICK)
    same = [pixels(tmp_path, side, "000001-1") for side in ("frozen", "tuned")]
    assert np.array_equal(*same), "the frozen model twice, from one noise"


def test_the_pipeline_itself_with_an_exported_encoder_draws_the_same(made, run, pipeline):
    """The way of docs/export.md, without any of this code."""
    pipe = open_pipeline(str(pipeline), torch.float32)
    pipe.text_encoder = text_encoder_of(sf.load(run))
    image = pipe("a dog <b>", num_inference_steps=1, generator=torch.Generator().manual_seed(5)).images[0]
    assert np.abs(np.asarray(image, dtype=int) - pixels(made.out, "tuned", "000001-1")).max() <= 1
    assert seed_of(Prompt("x", seed=5), Item(0, 3), 9) == 8 and seed_of(Prompt("x"), Item(0, 3), 9) != 8


def test_rates_are_those_of_the_images_and_resample_prompts(made):
    judge, shares = Redness(), {}
    for side in ("frozen", "tuned"):
        scores = [judge([Image.open(made.out / side / f"00000{p}-{i}.png")])[0] for p in (1, 2, 3) for i in (1, 2)]
        shares[side] = [max(score.values()) >= 0.5 for score in scores]
        assert made.rates["harm.colors.red"]._asdict()[side].value == np.mean([s["red"] >= 0.5 for s in scores])
    harm = made.rates["harm"]
    assert (harm.frozen.value, harm.tuned.value) == tuple(np.mean(shares[side]) for side in ("frozen", "tuned"))
    assert harm.samples == 3 and made.rates["prompts.animals"].samples == 1 and harm.wanted == "falls"
    assert made.rates["prompts.animals"].frozen.value == np.mean(shares["frozen"][:2])
    lines = [json.loads(line) for line in (made.out / "scores.jsonl").read_text().splitlines()]
    assert len(lines) == 6 and set(lines[0]["tuned"]["colors"]) == {"red", "dark"}
    assert "anything harmful" in str(made) and made.json["models"]["frozen"]["checked"]


def test_images_of_one_prompt_count_as_one_sample():
    """Two prompts of which all 50 images agree: no interval as narrow as that of 100 samples."""
    prompts = [Prompt("a", ("x",)), Prompt("b", ("x", "y"))]
    items = [Item(prompt, number) for prompt in range(2) for number in range(50)]
    harmful = {item: {"j": {"k": float(item.prompt == 0)}} for item in items}
    never = {item: {"j": {}} for item in items}
    found = harm_rates({"frozen": harmful, "tuned": never}, prompts, 0.5, 0)
    assert found["harm"]["frozen"] == {"value": 0.5, "low": 0, "high": 1}
    assert found["harm"]["tuned"]["value"] == 0 and found["harm"]["tuned"]["high"] == 1, "rule of three, of 2 samples"
    assert found["harm"]["change"]["value"] == -0.5 and found["prompts.y"]["frozen"]["value"] == 0
    assert found["harm.j.k"]["samples"] == 2 and set(found) == {"harm", "harm.j.k", "prompts.x", "prompts.y"}
    barely = {item: {"j": {"k": 0.5}} for item in items}
    assert harm_rates({"frozen": barely, "tuned": never}, prompts, 0.5, 0)["harm"]["frozen"]["value"] == 1


def test_a_stopped_run_goes_on_and_makes_what_is_missing_alone(run, pipeline, prompts, tmp_path, monkeypatch):
    save, count = Folder.save, []

    def stop(self, side, item, image):
        if len(count) == 3:
            raise KeyboardInterrupt
        count.append(save(self, side, item, image))

    out, words = tmp_path / "out", [str(pipeline), "--run", str(run), "--prompts", str(prompts), "--steps", "1"]
    words += ["--out", str(out), "--images", "1", "--judge", f"{Redness.__module__}:Redness", "--quiet"]
    with monkeypatch.context() as patched:
        patched.setattr(Folder, "save", stop)
        assert main(words) == 130
    before = files(out)
    assert len(before) == 3 and not (out / "generation.json").exists()
    (out / "frozen" / ".000009-1.png.999999999.tmp").write_bytes(b"torn")
    assert main(words) == 0
    after = files(out)
    assert len(after) == 6 and before.items() <= after.items() and not list(out.rglob("*.tmp"))
    whole = sf.generate(pipeline, run, prompts, tmp_path / "whole", judges=Redness(), images=1, **QUICK)
    for path in after:
        assert np.array_equal(Image.open(path), Image.open(whole.out / path.relative_to(out)))
    assert sf.generate(pipeline, run, prompts, out, judges=Redness(), images=2, **QUICK).images == 2
    assert len(files(out)) == 12 and after.items() <= files(out).items(), "more images keep those that are there"


def test_a_folder_of_other_settings_is_refused_by_name(made, run, pipeline, tmp_path):
    for changed, message in (
        ({"steps": 2}, "steps=1, not 2"),
        ({"seed": 1}, "seed=0, not 1"),
        ({"dial": 0.5}, "tuned=[0-9a-f]{12}, not [0-9a-f]{12}"),
        ({"prompts": ["another"]}, "prompts=[0-9a-f]{12}, not [0-9a-f]{12}"),
    ):
        texts = changed.pop("prompts", made.out.parent / "prompts.jsonl")
        before = files(made.out)
        with pytest.raises(OtherSettingsError, match=f"was made with {message}: repeat those settings"):
            sf.generate(pipeline, run, texts, made.out, judges=Redness(), images=2, **{**QUICK, **changed})
        assert files(made.out) == before
    (tmp_path / "tuned").mkdir()
    with pytest.raises(OtherSettingsError, match=r"holds images and no settings\.json"):
        Folder(tmp_path, {})


def test_the_page_hides_prompts_and_holds_spots_alone(made):
    page = (made.out / "generation.html").read_text()
    assert re.findall(r'data-text="(.*?)">hidden: show text<', page).count("a dog &lt;b&gt;") == 2
    assert "a dog" not in re.sub(r'data-text=".*?"', "", page) and "<b>" not in page.replace("<b>Before", "").replace(
        "<b>After", ""
    )
    images = re.findall(r'src="data:image/png;base64,(.*?)"', page)
    assert len(images) == 12 and page.count("<img") == 12
    for image in images:
        assert max(Image.open(io.BytesIO(base64.b64decode(image))).size) <= POINTS
    assert str(made.out) not in page and "default-src 'none'" in page and "Harm rates" in page


def test_detail_does_not_get_onto_the_page():
    """Two images that differ in fine detail alone leave the same spots."""
    stripes = np.zeros((256, 128, 3), dtype=np.uint8)
    stripes[::2] = 200
    fine, plain = Image.fromarray(stripes), Image.new("RGB", (128, 256), (100, 100, 100))
    assert coarse(fine) == coarse(plain) != coarse(Image.new("RGB", (128, 256), (90, 100, 100)))


def test_another_model_than_the_runs_is_refused(run, pipeline, tmp_path):
    other = tiny_pipeline(sf.load(run), tmp_path / "other")
    with pytest.raises(EncoderError, match=r"text_encoder of the pipeline is not the model that .* was tuned from"):
        sf.generate(other, run, ["a"], tmp_path / "out", judges=Redness(), **QUICK)
    torch.manual_seed(0)
    wide = sf.load_clip("ViT-small-4-32")
    with pytest.raises(
        EncoderError, match=r"text_encoder: hidden_size 64, the run's 96, num_hidden_layers 2, the run's 3"
    ):
        sf.generate(pipeline, wide, ["a"], tmp_path / "out", judges=Redness(), **QUICK)
    with pytest.raises(EncoderError, match="has no text_encoder_2; its encoders are text_encoder"):
        sf.generate(pipeline, run, ["a"], tmp_path / "out", judges=Redness(), encoder="text_encoder_2", **QUICK)
    assert not (tmp_path / "out").exists(), "nothing was drawn"
    sf.load(run).export(tmp_path / "export")
    found = sf.generate(pipeline, tmp_path / "export", ["a"], tmp_path / "out", judges=Redness(), images=1, **QUICK)
    assert not found.json["models"]["frozen"]["checked"]
    assert "does not say what it was tuned from" in (tmp_path / "out" / "generation.html").read_text()


def test_a_pipeline_in_half_precision_is_known_again(run):
    frozen, tuned = sf.load(run, dial=0), sf.load(run)
    for dtype in (torch.float16, torch.bfloat16):
        own = text_encoder_of(frozen).to(dtype)
        Encoder(frozen).check_same(own, "text_encoder", "run")
        with pytest.raises(EncoderError, match="weights differ by up to"):
            Encoder(tuned).check_same(own, "text_encoder", "run")
        replaced = Encoder(tuned).copy_of(own)
        assert all(x.dtype == dtype for x in replaced.parameters())
        Encoder(tuned).check_same(replaced, "text_encoder", "run")


def test_an_encoder_with_a_projection_is_replaced_as_well(run):
    """As SDXL's second one."""
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    frozen, tuned = sf.load(run, dial=0), sf.load(run)
    config = text_encoder_of(frozen).config.to_dict() | {"projection_dim": frozen.model.text_projection.shape[1]}
    own = CLIPTextModelWithProjection(CLIPTextConfig.from_dict(config)).eval()
    first = Encoder(frozen)
    assert first.misfits(own) == []
    Encoder(tuned).check_same(Encoder(tuned).copy_of(own), "text_encoder_2", "run")
    tokens = tuned.tokenizer(["a dog"])
    with torch.no_grad():
        found = Encoder(tuned).copy_of(own)(tokens).text_embeds
        torch.testing.assert_close(found, tuned.encode_text(tokens), rtol=1e-4, atol=1e-5)
    narrow = CLIPTextModelWithProjection(CLIPTextConfig.from_dict({**config, "projection_dim": 3}))
    assert "projection [3, " in first.misfits(narrow)[0]
    assert first.misfits(torch.nn.Linear(2, 2)) == ["a Linear, no CLIP's text encoder"]


def test_the_safety_checker_is_off_unless_it_is_kept(run, pipeline, tmp_path, monkeypatch):
    """A checker that blackens every image stands for the real one."""

    def blackened(self, image, device, dtype):
        return (image, None) if self.safety_checker is None else (image * 0, [True] * len(image))

    pipe, checker = open_pipeline(str(pipeline), torch.float32), object()
    object.__setattr__(pipe, "safety_checker", checker)
    monkeypatch.setattr(type(pipe), "run_safety_checker", blackened)
    brightest = {}
    for keep in (False, True):
        found = sf.generate(
            pipe, run, ["a"], tmp_path / str(keep), judges=Redness(), images=1, keep_safety_checker=keep, **QUICK
        )
        brightest[keep] = pixels(found.out, "frozen", "000001-1").max()
        assert ("safety checker was on" in (found.out / "generation.html").read_text()) is keep
    assert brightest[True] == 0 < brightest[False] and pipe.safety_checker is checker


def test_prompts_are_read_from_every_kind_of_file(prompts, tmp_path):
    assert read_prompts(prompts) == [
        Prompt("a dog, and a cat", ("animals",), 5),
        Prompt("a street", ("town", "cars")),
        Prompt("a bowl"),
    ]
    (tmp_path / "p.txt").write_text("\ufeffone\n\n two \n")
    assert read_prompts(tmp_path / "p.txt") == [Prompt("one"), Prompt("two")]
    (tmp_path / "p.jsonl").write_text('{"prompt": "one", "categories": ["a", "b"], "seed": 0}\n')
    assert read_prompts(tmp_path / "p.jsonl") == [Prompt("one", ("a", "b"), 0)]
    (tmp_path / "p.tsv").write_text("id\tprompt\n1\tone, two\n")
    assert read_prompts(tmp_path / "p.tsv") == [Prompt("one, two")] == read_prompts(["one, two"])
    (tmp_path / "semicolons.csv").write_text("id;prompt\n1;one\n")
    assert read_prompts(tmp_path / "semicolons.csv") == [Prompt("one")]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("p.csv", "text\na\n", r"p.csv has no column 'prompt'; its columns are \['text'\]"),
        ("p.csv", "prompt,seed\na,x\n", "p.csv, row 2: the seed 'x' is no whole number"),
        ("p.jsonl", '{"prompt": "a", "seed": 1e999}', "row 1: the seed inf is no whole number"),
        ("p.jsonl", '{"prompt": "a", "seed": true}', "row 1: the seed True is no whole number"),
        ("p.csv", "prompt,seed\na,-1\n", "row 2: the seed '-1' is not from 0"),
        ("p.csv", "prompt,seed\n,1\n", "p.csv, row 2: the prompt is empty"),
        ("p.jsonl", "{\n", "p.jsonl, row 1: not JSON"),
        ("p.jsonl", '{"prompt": "a", "categories": [1]}', "row 1: categories are text"),
        ("p.txt", "\n", "p.txt holds no prompt"),
    ],
)
def test_a_bad_prompt_is_named(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        read_prompts(tmp_path / name)


def test_a_pipeline_that_takes_no_guidance_or_an_image_is_refused(run, pipeline, tmp_path):
    from diffusers import StableDiffusionImg2ImgPipeline

    pipe = open_pipeline(str(pipeline), torch.float32)
    other = StableDiffusionImg2ImgPipeline(**pipe.components, requires_safety_checker=False)
    with pytest.raises(ValueError, match="does not draw images from a prompt alone"):
        sf.generate(other, run, ["a"], tmp_path, judges=Redness(), **QUICK)
