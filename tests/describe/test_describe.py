"""Texts with both image encoders from tiny random models: what is written, counted, shown, resumed and refused."""

import base64
import io
import json
import re
from html import unescape

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoProcessor, LlavaForConditionalGeneration

import saferclip_fast as sf
from saferclip_fast.data import DataError
from saferclip_fast.describe.__main__ import main
from saferclip_fast.describe.texts import Texts
from saferclip_fast.describe.writer import Writer
from saferclip_fast.generate.encoders import Encoder, EncoderError
from saferclip_fast.generate.folder import OtherSettingsError
from saferclip_fast.generate.page import POINTS
from tests.support.llava import tiny_captioner, tiny_llava, tower_of

QUICK = {"tokens": 6, "progress": False, "device": "cpu"}
NAMES = ["a.png", "b.png", "c.png", "d.png", "town/e.png", "town/f.png"]
TEMPLATE = (
    "{% for m in messages %}USER: {% for c in m.content %}{{ c.text or '<image>' }} {% endfor %}{% endfor %}ANSWER:"
)


class Length:
    """A harm as far as a text is long."""

    name = "length"

    def __call__(self, texts):
        assert all(isinstance(text, str) for text in texts)
        return [{"long": min(1.0, len(text) / 60)} for text in texts]


def texts_of(folder, side):
    lines = [json.loads(line) for line in (folder / f"{side}.jsonl").read_text().splitlines()]
    return {line["image"]: line["text"] for line in lines}


@pytest.fixture(scope="session")
def written(run, llava, images, tmp_path_factory):
    """Judged by a word that the model itself writes for some images."""
    folder = tmp_path_factory.mktemp("written")
    sf.describe(llava, run, images, folder / "first", judges=Length(), **QUICK)
    words = [re.findall(r"\w+", text.casefold()) for text in texts_of(folder / "first", "frozen").values()]
    (folder / "words.txt").write_text(f"# mine\nlong: {words[0][0]}, {words[1][0]}\nrare: no such words\n")
    return sf.describe(llava, run, images, folder / "out", words=folder / "words.txt", **QUICK)


def test_texts_are_those_of_transformers_with_either_encoder(written, run, llava, images):
    """One image at a time, without any of this code."""
    processor = AutoProcessor.from_pretrained(llava)
    model = LlavaForConditionalGeneration.from_pretrained(llava).eval()
    for side, dial in (("frozen", 0), ("tuned", 1)):
        model.model.vision_tower = tower_of(sf.load(run, dial=dial))
        found = texts_of(written.out, side)
        assert sorted(found) == NAMES
        for name in NAMES:
            inputs = processor(
                images=Image.open(images / name), text="<image>\nDescribe this image.", return_tensors="pt"
            )
            tokens = model.generate(**inputs, do_sample=False, max_new_tokens=6)[0, inputs["input_ids"].shape[1] :]
            assert found[name] == processor.decode(tokens, skip_special_tokens=True).strip()
    frozen, tuned = (texts_of(written.out, side) for side in ("frozen", "tuned"))
    assert len(set(frozen.values())) > 1 and frozen != tuned, "the image decides, and the encoder"


def test_one_model_twice_writes_the_same(run, llava, images, tmp_path):
    sf.describe(llava, run, images, tmp_path, judges=Length(), dial=0.0, **QUICK)
    assert texts_of(tmp_path, "frozen") == texts_of(tmp_path, "tuned")


def test_rates_are_those_of_the_texts_and_resample_images(written):
    line = (written.out.parent / "words.txt").read_text().splitlines()[1]
    words = line.removeprefix("long: ").split(", ")
    for side in ("frozen", "tuned"):
        has = [
            any(re.search(rf"(?<!\w){re.escape(word)}(?!\w)", text.casefold()) for word in words)
            for _, text in sorted(texts_of(written.out, side).items())
        ]
        assert written.rates["harm"]._asdict()[side].value == pytest.approx(np.mean(has))
        assert written.rates["images.town"]._asdict()[side].value == np.mean(has[4:])
    harm = written.rates["harm"]
    assert harm.frozen.value > 0 and harm.samples == written.images == 6 and harm.wanted == "falls"
    assert harm.change.value == pytest.approx(harm.tuned.value - harm.frozen.value)
    assert written.rates["harm.words.rare"].frozen.value == 0 and written.rates["images.town"].samples == 2
    lines = [json.loads(line) for line in (written.out / "scores.jsonl").read_text().splitlines()]
    assert [line["image"] for line in lines] == NAMES and set(lines[0]["tuned"]["words"]) == {"long", "rare"}
    assert "anything harmful" in str(written) and written.json["models"]["frozen"]["checked"]


def test_a_stopped_run_goes_on_and_writes_what_is_missing_alone(written, run, llava, images, tmp_path, monkeypatch):
    write, count = Writer.write, []

    def stop(self, block):
        if len(count) == 4:
            raise KeyboardInterrupt
        count.append(len(block))
        return write(self, block)

    out = tmp_path / "out"
    words = [str(llava), "--run", str(run), "--images", str(images), "--out", str(out), "--tokens", "6", "--quiet"]
    words += ["--words", str(written.out.parent / "words.txt"), "--batch-size", "2"]
    with monkeypatch.context() as patched:
        patched.setattr(Writer, "write", stop)
        assert main(words) == 130
    before = {side: (out / f"{side}.jsonl").read_text() for side in ("frozen", "tuned")}
    assert [text.count("\n") for text in before.values()] == [6, 2] and not (out / "description.json").exists()
    with (out / "tuned.jsonl").open("a") as file:
        file.write('{"image": "c.png", "te')
    count.clear()
    with monkeypatch.context() as patched:
        patched.setattr(Writer, "write", stop)
        assert main(words) == 0
    assert count == [2, 2], "four of the tuned texts were missing"
    for side, text in before.items():
        assert (out / f"{side}.jsonl").read_text().startswith(text)
        assert texts_of(out, side) == texts_of(written.out, side)


def test_a_folder_of_other_settings_is_refused_by_name(written, run, llava, images, tmp_path):
    for changed, message in (
        ({"tokens": 2}, "tokens=6, not 2"),
        ({"question": "What?"}, "question=<image>\nDescribe this image., not <image>\nWhat[?]"),
        ({"dial": 0.5}, "tuned=[0-9a-f]{12}, not [0-9a-f]{12}"),
        ({"images": images / "town"}, "images=[0-9a-f]{12}, not [0-9a-f]{12}"),
    ):
        folder, before = changed.pop("images", images), (written.out / "tuned.jsonl").read_text()
        with pytest.raises(OtherSettingsError, match=f"was made with {message}: repeat those settings"):
            sf.describe(llava, run, folder, written.out, judges=Length(), **{**QUICK, **changed})
        assert (written.out / "tuned.jsonl").read_text() == before
    (tmp_path / "tuned.jsonl").write_text("")
    with pytest.raises(OtherSettingsError, match=r"holds texts and no settings\.json"):
        Texts(tmp_path, {})
    (tmp_path / "settings.json").write_text("{}")
    (tmp_path / "tuned.jsonl").write_text('{"image": "a", "text": "b"}\n{"image": 3}\n')
    with pytest.raises(DataError, match=r"tuned\.jsonl, line 2 is damaged: remove the line"):
        Texts(tmp_path, {})


def test_the_page_hides_texts_and_names_and_holds_spots_alone(written):
    page = (written.out / "description.html").read_text()
    hidden = [unescape(text) for text in re.findall(r'data-text="(.*?)">hidden: show text<', page, re.DOTALL)]
    texts = [text for side in ("frozen", "tuned") for text in texts_of(written.out, side).values()]
    assert sorted(hidden) == sorted(texts + NAMES)
    shown = re.sub(r'data-text=".*?"', "", page, flags=re.DOTALL)
    assert not any(text in unescape(shown) for text in texts + NAMES)
    images = re.findall(r'src="data:image/png;base64,(.*?)"', page)
    assert len(images) == 6 and page.count("<img") == 6
    for image in images:
        assert max(Image.open(io.BytesIO(base64.b64decode(image))).size) <= POINTS
    assert str(written.out) not in page and "default-src 'none'" in page and "6 images, a text each" in page


def test_another_model_than_the_runs_is_refused(run, llava, images, tmp_path):
    other = tiny_llava(sf.load(run), tmp_path / "other")
    with pytest.raises(EncoderError, match=r"model\.vision_tower of the model is not the model that .* was tuned from"):
        sf.describe(other, run, images, tmp_path / "out", judges=Length(), **QUICK)
    torch.manual_seed(0)
    wide = sf.load_clip("ViT-small-4-32")
    with pytest.raises(EncoderError, match=r"vision_tower: hidden_size 64, the run's 192, .*patch_size 8, the run's 4"):
        sf.describe(llava, wide, images, tmp_path / "out", judges=Length(), **QUICK)
    with pytest.raises(EncoderError, match=r"the model has no tower; its encoders are model\.vision_tower"):
        sf.describe(llava, run, images, tmp_path / "out", judges=Length(), encoder="tower", **QUICK)
    assert not (tmp_path / "out").exists(), "nothing was written"
    assert Encoder(wide).misfits(tower_of(wide)) == ["a CLIPVisionModel, no CLIP's text encoder"]
    sf.load(run).export(tmp_path / "export")
    found = sf.describe(llava, tmp_path / "export", images, tmp_path / "out", judges=Length(), **QUICK)
    assert not found.json["models"]["frozen"]["checked"]
    assert "does not say what it was tuned from" in (tmp_path / "out" / "description.html").read_text()


def test_a_model_in_half_precision_is_known_again(run):
    frozen, tuned = sf.load(run, dial=0), sf.load(run)
    own = tower_of(frozen).half()
    Encoder(frozen, "vision_model").check_same(own, "tower", "run")
    with pytest.raises(EncoderError, match="weights differ by up to"):
        Encoder(tuned, "vision_model").check_same(own, "tower", "run")
    assert all(x.dtype == torch.float16 for x in Encoder(tuned, "vision_model").copy_of(own).parameters())


def test_a_model_that_takes_no_question_is_asked_none(run, images, tmp_path):
    captioner = tiny_captioner(sf.load(run, dial=0), tmp_path / "captioner")
    found = sf.describe(captioner, run, images, tmp_path / "out", judges=Length(), **QUICK)
    assert found.json["settings"]["question"] is None and found.json["settings"]["encoder"] == "encoder"
    frozen, tuned = (texts_of(tmp_path / "out", side) for side in ("frozen", "tuned"))
    assert len(set(frozen.values())) > 1 and frozen != tuned and all(frozen.values())


def test_the_question_is_put_as_the_model_was_taught(run, images, tmp_path):
    llava = tiny_llava(sf.load(run, dial=0), tmp_path / "llava", TEMPLATE)
    writer = Writer(str(llava), "What is it?", 2, torch.float32, torch.device("cpu"))
    assert writer.question == "USER: <image> What is it? ANSWER:"
    assert len(writer.write([Image.open(images / "a.png").convert("RGB")] * 2)) == 2


def test_a_model_that_writes_no_texts_is_refused(run, images, tmp_path):
    sf.export(sf.load(run), tmp_path / "export", ["huggingface"])
    with pytest.raises(ValueError, match="is a clip model, which writes no texts for images: give one that"):
        sf.describe(tmp_path / "export" / "huggingface", run, images, tmp_path / "out", judges=Length(), **QUICK)


def test_a_broken_image_is_named_before_a_model_is_read(run, llava, images, tmp_path):
    (tmp_path / "x.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"x\.png"):
        sf.describe(llava, run, tmp_path, tmp_path / "out", judges=Length(), **QUICK)
