"""Judges: NudeNet's, a CLIP's by plain words, and one of the user's."""

import sys

import pytest
import torch
from PIL import Image

import saferclip_fast as sf
from saferclip_fast.generate.judges import CATEGORIES, SAFE, ClipJudge, judged, open_judges, read_categories
from tests.generate.conftest import Redness

NOISE = Image.effect_noise((64, 64), 50).convert("RGB")
RED, BLUE = (Image.new("RGB", (32, 32), color) for color in ("red", "blue"))


def test_nudenet_finds_nobody_in_noise():
    (judge,) = open_judges(["nudenet"])
    assert judge.name == "nudenet" and judged(judge, [NOISE, NOISE]) == [{"nudity": 0.0}] * 2


def test_a_clip_judges_by_the_difference_to_the_harmless_phrases():
    torch.manual_seed(0)
    clip = sf.load_clip("ViT-tiny-8-32")
    judge = ClipJudge(clip, {"loud": ["noise", "a crowd"], SAFE: ["silence", "a stone"]})
    found = judged(judge, [RED, BLUE, NOISE])
    image = torch.nn.functional.normalize(
        clip.encode_image(torch.stack([clip.preprocess(x) for x in (RED, BLUE, NOISE)]))
    )

    def row(phrase):
        texts = [
            template.replace("{}", phrase) for template in ("{}", "a photo of {}", "a picture of {}", "a drawing of {}")
        ]
        rows = torch.nn.functional.normalize(clip.encode_text(clip.tokenizer(texts)))
        return torch.nn.functional.normalize(rows.mean(0), dim=0)

    with torch.no_grad():
        harm = torch.nn.functional.normalize(row("noise") + row("a crowd"), dim=0)
        safe = torch.maximum(image @ row("silence"), image @ row("a stone"))
        wanted = torch.sigmoid(clip.model.logit_scale.exp() * (image @ harm - safe))
    assert [scores["loud"] for scores in found] == pytest.approx(wanted.tolist(), abs=1e-4)
    assert len({round(scores["loud"], 6) for scores in found}) == 3
    shipped = judged(ClipJudge(clip), [RED])[0]
    assert set(shipped) == {*CATEGORIES} - {SAFE}


def test_a_harm_is_found_where_the_image_is_nearer_to_it_than_to_what_is_harmless():
    """A stub that puts red images beside one word and blue ones beside another."""

    class Stub(torch.nn.Module):
        device, pad_id, trims_text = torch.device("cpu"), 0, False

        def __init__(self):
            super().__init__()
            self.model = torch.nn.Module()
            self.model.logit_scale = torch.nn.Parameter(torch.tensor(3.0))

        def preprocess(self, image):
            return torch.tensor(image.getpixel((0, 0))) / 255

        def encode_image(self, pixels):
            return pixels

        def tokenizer(self, texts):
            return torch.tensor([[1 if "fire" in text else 2] for text in texts])

        def encode_text(self, tokens):
            return torch.stack([torch.eye(3)[0 if token == 1 else 2] for token in tokens.flatten()])

    found = judged(ClipJudge(Stub(), {"fire": ["fire"], SAFE: ["water"]}), [RED, BLUE])
    assert found[0]["fire"] > 0.99 and found[1]["fire"] < 0.01


class Plain:
    """A classifier of the kind that `label` takes."""

    def __call__(self, images):
        return [0.25] * len(images)


class Wrong:
    def __init__(self, answer):
        self.name, self.answer = "wrong", answer

    def __call__(self, images):
        return self.answer


def test_one_of_the_users_is_imported_and_called_once():
    one, other = open_judges([f"{__name__}:Plain", f"{Redness.__module__}:Redness"])
    assert judged(one, [RED]) == [{f"{__name__}:Plain": 0.25}] and other.name == "colors"
    assert judged(other, [RED])[0]["red"] == 1.0
    for answer in ([], [{"a": 2}], [{"a": float("nan")}], ["yes"], [None]):
        with pytest.raises(ValueError, match=r"the judge wrong gave .* for 1 images"):
            judged(Wrong(answer), [RED])


def test_judges_that_cannot_be_had_are_named(tmp_path, monkeypatch):
    for names, options, message in (
        ([], {}, "nothing judges the images"),
        (["violence"], {}, "write nudenet, clip, or MODULE:FACTORY"),
        (["nudenet", "nudenet"], {}, "is named twice"),
        (["clip"], {}, "--judge clip needs a CLIP"),
        (["nudenet"], {"model": "ViT-tiny-8-32,"}, "are of --judge clip"),
        (["json:nothing"], {}, "has no attribute 'nothing'"),
    ):
        with pytest.raises(ValueError, match=message):
            open_judges(names, **options)
    with pytest.raises(ImportError, match="no_such_module"):
        open_judges(["no_such_module:Judge"])
    with pytest.raises(FileNotFoundError, match=r"cannot read .*none\.txt"):
        open_judges(["clip"], "ViT-tiny-8-32,", str(tmp_path / "none.txt"))
    monkeypatch.setitem(sys.modules, "nudenet", None)
    with pytest.raises(ImportError, match=r"pip install 'saferclip-fast\[evaluate\]'"):
        open_judges(["nudenet"])


def test_a_judge_needs_a_name_of_its_own(tmp_path):
    for judges, message in (
        (Plain(), "has no name: give it one"),
        ([Redness(), Redness()], "two judges are called 'colors'"),
    ):
        with pytest.raises(ValueError, match=message):
            sf.generate("hf-hub:a/b", "run", ["a"], tmp_path / "out", judges=judges, device="cpu", progress=False)


def test_categories_are_read_line_by_line(tmp_path):
    file = tmp_path / "c.txt"
    file.write_text("# mine\nfire: fire\nfire: a burning house\n\nsafe: a house\n")
    assert read_categories(file) == {"fire": ["fire", "a burning house"], "safe": ["a house"]}
    for text, message in (("fire\n", "line 1: write CATEGORY: PHRASE"), ("safe: a\n", "names no category of harm")):
        file.write_text(text)
        with pytest.raises(ValueError, match=message):
            read_categories(file)
