"""Quadruplets without unsafe images: the text encoder learns alone, and whatever shows figures says so."""

import json

import pytest
import torch
from safetensors.torch import load_file

import saferclip_fast as sf
from saferclip_fast import data
from saferclip_fast.data import DataError, open_quadruplets
from saferclip_fast.export.model_card import card
from saferclip_fast.report import load_runs, render
from saferclip_fast.results import NO_UNSAFE_IMAGES
from saferclip_fast.sources import load_source
from saferclip_fast.train.__main__ import main as command
from saferclip_fast.train.text_only import SAID
from tests.support.tiny import tiny_words

TEXTS = ("safe_text", "unsafe_text")


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """A table as ViSU is public: safe images and both texts."""
    folder = tmp_path_factory.mktemp("table")
    lines = []
    for index, record in enumerate(open_quadruplets("scenes:n=48,size=32,mixed=0").records):
        record.safe_image.load().save(folder / f"{index}.png")
        lines.append({"safe_image": f"{index}.png", **{name: getattr(record, name) for name in TEXTS}})
    (folder / "pairs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder / "pairs.jsonl"


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    torch.manual_seed(7)
    return sf.load_clip("ViT-tiny-8-32").export(tmp_path_factory.mktemp("weights"))


def words(run_dir, weights, table, *more):
    given = tiny_words(run_dir, weights, run_dir.parent / "cache")
    short = [
        "train.epochs=2",
        "data.val_fraction=0.25",
        "curriculum.enabled=false",
        "objective.k=4",
        "objective.guard_k=4",
    ]
    return [*given, f"data.train={table}", "data.text_only=true", *short, *more]


@pytest.fixture(scope="module")
def run(tmp_path_factory, weights, table):
    run_dir = tmp_path_factory.mktemp("runs") / "run"
    assert command(words(run_dir, weights, table)) == 0
    return run_dir


def moved(run_dir, weights) -> set[str]:
    now, then = load_file(run_dir / "final" / "open_clip_model.safetensors"), load_file(weights)
    return {name for name in then if not torch.equal(now[name], then[name])}


def test_without_being_told_a_file_without_unsafe_images_is_refused_with_both_remedies(table, tmp_path):
    with pytest.raises(DataError, match=r"has no column 'unsafe_image'|no unsafe_image"):
        open_quadruplets(table)
    lines = [json.loads(line) for line in table.read_text().splitlines()]
    (tmp_path / "pairs.csv").write_text("safe_image,safe_text,unsafe_text\na.png,b,c\n")
    with pytest.raises(
        DataError, match=r"has no column 'unsafe_image'; .*; or go without unsafe images, data.text_only=true"
    ):
        open_quadruplets(tmp_path / "pairs.csv")
    visu = {"0": {"safe": "a", "nsfw": "b", "coco_id": 7}}
    (tmp_path / "visu.json").write_text(json.dumps(visu))
    (tmp_path / "000000000007.jpg").write_bytes((table.parent / lines[0]["safe_image"]).read_bytes())
    with pytest.raises(DataError, match=r"or train the text encoder alone, data.text_only=true"):
        open_quadruplets(tmp_path / "visu.json", root=tmp_path)
    found = open_quadruplets(tmp_path / "visu.json", root=tmp_path, text_only=True)
    assert found.text_only and found.records[0].unsafe_text == "b" and found.records[0].unsafe_image_label == 0


@pytest.mark.parametrize("way", ["jsonl", "csv", "parquet", "shards", "memory", "scenes"])
def test_every_reader_leaves_unsafe_images_alone(table, tmp_path, way):
    lines = [json.loads(line) for line in table.read_text().splitlines()]
    if way == "scenes":
        found = open_quadruplets("scenes:n=48,size=32,mixed=0", text_only=True)
    elif way == "shards":
        data.write_shards(open_quadruplets(table, text_only=True), tmp_path / "shards", progress=False)
        found = open_quadruplets(tmp_path / "shards", text_only=True)
    elif way == "memory":
        inside = [line | {"safe_image": (table.parent / line["safe_image"]).read_bytes()} for line in lines]
        found = data.open_rows(inside, tmp_path / "rows", text_only=True, progress=False)
    else:
        import pandas as pd

        frame, path = pd.DataFrame(lines), tmp_path / f"pairs.{way}"
        write = {"jsonl": lambda: frame.to_json(path, orient="records", lines=True), "csv": lambda: frame.to_csv(path)}
        write.get(way, lambda: frame.to_parquet(path))()
        found = open_quadruplets(path, root=table.parent, text_only=True)
    assert found.text_only and len(found) == 48 and found.records[3].unsafe_text == lines[3]["unsafe_text"]
    item = found[3]
    assert item["unsafe_image"] is item["safe_image"] and item["unsafe_image_label"] == 0


def test_the_image_encoder_stays_bit_for_bit_and_the_text_encoder_moves(run, weights):
    names = moved(run, weights)
    assert names and not {name for name in names if name.startswith("visual.")}


@pytest.mark.parametrize(
    "more",
    [
        ["model.tuning=full"],
        ["train.micro_batch_size=3"],
        ["objective.name=safeclip"],
        ["data.decoded_cache=true"],
        ["lora.dora=true", "lora.init=fisher"],
    ],
)
def test_however_it_is_trained(more, weights, table, tmp_path):
    assert command(words(tmp_path / "run", weights, table, *more)) == 0
    names = moved(tmp_path / "run", weights)
    assert names and not {name for name in names if name.startswith("visual.")}


def test_micro_batches_give_the_same_weights(run, weights, table, tmp_path):
    assert command(words(tmp_path / "run", weights, table, "train.micro_batch_size=3", "lora.dropout=0")) == 0
    assert command(words(tmp_path / "whole", weights, table, "lora.dropout=0")) == 0
    one, other = (load_file(tmp_path / name / "final" / "open_clip_model.safetensors") for name in ("run", "whole"))
    assert all(torch.allclose(one[name], other[name], atol=1e-4) for name in one)


def test_it_is_said_once_at_the_start(weights, table, tmp_path, capsys):
    assert command(words(tmp_path / "run", weights, table)) == 0
    assert capsys.readouterr().out.count(SAID) == 1
    assert command([*words(tmp_path / "other", weights, table), "--dry-run"]) == 0
    assert capsys.readouterr().out.count(SAID) == 1


def test_what_needs_unsafe_images_is_left_out_and_said_not_counted_as_zero(run, tmp_path):
    found = sf.evaluate(run, samples=50, progress=False, out=tmp_path / "evaluation")
    names = set(found.metrics)
    assert not {name for name in names if "unsafe_image" in name or name.startswith(("S-G", "U-G"))}
    assert {"safe_image_finds_unsafe_text@10", "unsafe_text_finds_right_image@10", "S-V.text_to_image@1"} <= names
    assert found.json["text_only"] is True and found.json["safe_unsafe_table"] == []
    page = render(load_runs([tmp_path / "evaluation"]))
    assert page.count(NO_UNSAFE_IMAGES) == 1


def test_the_dial_says_what_it_lacks(run):
    with pytest.raises(ValueError, match=r"the safety dial needs unsafe images, and these quadruplets have none"):
        sf.evaluate(run, samples=50, progress=False, dial=True)


def test_a_gallery_of_images_holds_each_safe_one_once(run):
    """U-V is a search for right images among the distinct safe ones; so is this where nothing else is there."""
    found = sf.evaluate(run, samples=50, progress=False)
    for k in (1, 5, 10):
        assert found[f"unsafe_text_finds_right_image@{k}"].tuned == found[f"U-V.text_to_image@{k}"].tuned


def test_the_command_and_the_card_say_so(run, tmp_path, capsys):
    from saferclip_fast.evaluate.__main__ import main as evaluate

    assert evaluate([str(run), "--samples", "50", "--quiet"]) == 0
    assert NO_UNSAFE_IMAGES in capsys.readouterr().out
    text = card(load_source(run), ["open_clip"], False)
    assert text.count("Trained without unsafe images") == 1 and text.count(NO_UNSAFE_IMAGES) == 1


def test_its_adapters_are_exported(run, tmp_path):
    exported = sf.export(run, tmp_path / "out", ["peft"])
    assert exported["peft"].difference < 1e-4
