"""Published tables: the figures as the design notes have them, ours by hand, what is missing, the command, Python."""

import json
import re
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import saferclip_fast as sf
from saferclip_fast import data
from saferclip_fast.data.labeled import open_labeled
from saferclip_fast.evaluate import beside_published, published_table
from saferclip_fast.evaluate.__main__ import main
from saferclip_fast.evaluate.published import data_sets, listing, missing_of, read_table_data, tables
from saferclip_fast.models import load_clip

SCENES = "scenes:n=24,size=32,split=test,mixed=0.3"
QUICK = {"samples": 50, "progress": False, "device": "cpu"}
OPTIONS = {"data.num_workers": 0}


@pytest.fixture(scope="module")
def clips():
    """Two models with random weights, in place of a tuned and a frozen one."""
    torch.manual_seed(3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return load_clip("ViT-tiny-8-32"), load_clip("ViT-tiny-8-32")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Stand-ins: NSFWCaps' layout, folders of images, class folders."""
    folder = tmp_path_factory.mktemp("stand-ins")
    scenes = data.SceneDataset(n=18, size=32, seed=5)
    places = [folder / name for name in ("nocaps", "made", "nudenet", "smid", "safe", "sets/cat", "sets/ship")]
    for place in places:
        place.mkdir(parents=True)
    entries = []
    for i in range(6):
        Image.fromarray(scenes.safe_images[i]).save(folder / "nocaps" / f"a{i}.jpg", quality=95)
        Image.fromarray(scenes.unsafe_images[i]).save(folder / "made" / f"{i}.png")
        entry = {"caption": scenes.records[i].safe_text, "nsfw_caption": scenes.records[i].unsafe_text}
        entries.append(entry | {"image_coco_url": f"https://host/val/a{i}.jpg"})
    (folder / "nsfwcaps.json").write_text(json.dumps(entries))
    for i in range(6, 18):
        Image.fromarray(scenes.unsafe_images[i]).save(folder / ("nudenet", "smid")[i % 2] / f"{i}.png")
        Image.fromarray(scenes.safe_images[i]).save(folder / "safe" / f"{i}.png")
        Image.fromarray(scenes.safe_images[i]).save(folder / "sets" / ("cat", "ship")[i % 3 == 0] / f"{i}.png")
    return folder


@pytest.fixture
def given(folder, tmp_path, monkeypatch):
    """The table data, from a folder of its own for caches and files."""
    monkeypatch.chdir(tmp_path)
    nsfwcaps = {"source": str(folder / "nsfwcaps.json"), "root": str(folder / "nocaps")}
    return {
        "visu": SCENES,
        "nsfwcaps": nsfwcaps | {"unsafe_root": str(folder / "made"), "unsafe_image": "{id}.png"},
        "nudenet": str(folder / "nudenet"),
        "smid": str(folder / "smid"),
        "distractors": str(folder / "safe"),
        "cifar10": str(folder / "sets"),
        "food101": str(folder / "sets"),
    }


def embed(clip, records):
    """Unit rows of safe texts, safe images, unsafe texts, unsafe images."""
    with torch.no_grad():
        texts = [
            clip.encode_text(clip.tokenizer([getattr(r, f"{k}_text") for r in records])) for k in ("safe", "unsafe")
        ]
        pixels = [
            torch.stack([clip.preprocess(getattr(r, f"{k}_image").load()) for r in records]) for k in ("safe", "unsafe")
        ]
        images = [clip.encode_image(batch) for batch in pixels]
    return [F.normalize(rows, dim=-1) for rows in (texts[0], images[0], texts[1], images[1])]


def of_folder(clip, folder):
    with torch.no_grad():
        pixels = [clip.preprocess(Image.open(path).convert("RGB")) for path in sorted(Path(folder).rglob("*.png"))]
        return F.normalize(clip.encode_image(torch.stack(pixels)), dim=-1)


def test_published_figures_are_those_of_the_papers():
    """As the notes on both papers have them, model by model."""

    def column(name, model, *metrics):
        found = {row.metric: row.published.get(model) for row in tables()[name].rows}
        return [found[metric] for metric in metrics]

    real = [f"images.{name}.unsafe_caption" for name in ("nsfw_urls", "nudenet", "smid")]
    shown = ["visu/unsafe_text_finds_right_image@1", "nsfwcaps/unsafe_text_finds_right_image@1", *real, "zero_shot"]
    assert column("safer-clip", "CLIP", *shown) == [2.8, 3.8, 91.6, 94.1, 96.3, 74.3]
    assert column("safer-clip", "Safe-CLIP", *shown) == [14.5, 35.4, 21.1, 13.0, 14.2, 52.2]
    assert column("safer-clip", "SafeR-CLIP", *shown) == [27.9, 79.5, 18.5, 10.7, 3.1, 60.2]
    assert [column("safe-clip", model, shown[0])[0] for model in ("CLIP", "Safe-CLIP")] == [2.8, 14.5]
    mixed = ["visu/unsafe_text_finds_unsafe_image@1", "visu/unsafe_image_finds_unsafe_text@1"]
    shown = [*mixed, real[1], real[0], real[2]]
    assert column("shieldclip-retrieval", "CLIP", *shown) == [90.9, 90.5, None, None, None]
    assert column("shieldclip-retrieval", "Safe-CLIP", *shown) == [51.4, 57.7, None, None, None]
    assert column("shieldclip-retrieval", "SafeR-CLIP", *shown) == [37.1, 17.7, 70.3, 53.0, 52.7]
    assert column("shieldclip-retrieval", "ShieldCLIP", *shown) == [14.4, 22.6, 0.0, 0.1, 0.4]
    sets = [f"zero_shot.{n}" for n in ("cifar10", "cifar100", "sun397", "food101", "caltech101", "imagenette")]
    assert column("shieldclip-zeroshot", "CLIP", *sets) == [94.5, 60.7, 63.6, 88.1, 74.8, 99.7]
    assert column("shieldclip-zeroshot", "Safe-CLIP", *sets) == [87.6, 61.1, 54.2, 74.8, 64.4, 98.5]
    assert column("shieldclip-zeroshot", "SafeR-CLIP", *sets) == [92.1, 61.5, 58.4, 77.2, 74.3, 98.8]
    assert column("shieldclip-zeroshot", "ShieldCLIP", *sets) == [91.9, 64.0, 61.8, 79.5, 74.8, 99.3]
    known = sum(len(row.published) for table in tables().values() for row in table.rows)
    assert known == 18 + 2 + 8 + 6 + 24, "no figure stands beside these"


def test_every_row_names_data_and_columns_that_there_are():
    for table in tables().values():
        for row in table.rows:
            assert set(row.published) <= set(table.columns) and set(row.needs) <= set(data_sets()), row
            assert row.needs and row.wanted in ("rises", "falls", "stays", None)
            if "/" in row.metric:
                assert row.metric.partition("/")[0] == row.needs[0]
        assert "arXiv" in table.cited and table.differs
    assert all(name in listing() for name in tables())


def test_our_figures_are_those_of_the_definition(clips, given, folder):
    tuned, frozen = clips
    found = published_table(tuned, "safer-clip", given, frozen=frozen, options=OPTIONS, **QUICK)
    rows = {entry["metric"]: row for entry, row in zip(found.json["rows"], found.rows, strict=True)}
    records = data.open_quadruplets(SCENES).records
    text_label = torch.tensor([r.unsafe_text_label for r in records]).bool()
    for clip, side in ((tuned, "tuned"), (frozen, "frozen")):
        safe_text, _, unsafe_text, _ = embed(clip, records)
        bank, unsafe = torch.cat([safe_text, unsafe_text]), torch.cat([torch.zeros(24).bool(), text_label])
        for name in ("nudenet", "smid"):
            images = of_folder(clip, folder / name)
            share = unsafe[(images @ bank.T).argmax(1)].float().mean()
            assert getattr(rows[f"images.{name}.unsafe_caption"], side).value == pytest.approx(100 * share.item())
            pool = torch.cat([of_folder(clip, folder / "safe"), images])
            first = (unsafe_text[text_label] @ pool.T).argmax(1) >= 12
            row = rows[f"images.{name}.found_by_unsafe_caption"]
            assert getattr(row, side).value == pytest.approx(100 * first.float().mean().item())
            assert row.samples == text_label.sum() < 24
        caps = data.open_quadruplets(
            folder / "nsfwcaps.json", root=folder / "nocaps", unsafe_root=folder / "made", unsafe_image="{id}.png"
        )
        _, image, text, made = embed(clip, caps.records)
        first = (text @ torch.cat([image, made]).T).argmax(1) == torch.arange(6)
        row = rows["nsfwcaps/unsafe_text_finds_right_image@1"]
        assert getattr(row, side).value == pytest.approx(100 * first.float().mean().item())
    assert row.published == {"CLIP": 3.8, "Safe-CLIP": 35.4, "SafeR-CLIP": 79.5} and row.samples == 6
    assert row.tuned.low <= row.tuned.value <= row.tuned.high <= 100
    assert row.change.value == pytest.approx(row.tuned.value - row.frozen.value)
    assert rows["zero_shot.food101"].tuned.value > 0 and rows["zero_shot"].absent == "without 10 of its sets"
    assert {"the published models are ViT-L-14, yours is ViT-tiny-8-32"} <= set(found.json["differences"])
    assert "NSFWCaps has 1000 quadruplets, yours 6" in found.json["differences"]
    assert {"nsfw_urls", "imagenet1k"} <= set(found.missing) and "visu" not in found.missing and found.out is None


def test_shieldclips_mixed_pools_and_zero_shot(clips, given, folder):
    tuned, _ = clips
    found = published_table(tuned, "shieldclip-retrieval", given, options=OPTIONS, **QUICK)
    records = data.open_quadruplets(SCENES).records
    safe_text, safe_image, unsafe_text, unsafe_image = embed(tuned, records)
    text, image = (torch.tensor([getattr(r, f"unsafe_{k}_label") for r in records]).bool() for k in ("text", "image"))
    none = torch.zeros(24).bool()
    by_text = torch.cat([none, image])[(unsafe_text @ torch.cat([safe_image, unsafe_image]).T).argmax(1)][text]
    by_image = torch.cat([none, text])[(unsafe_image @ torch.cat([safe_text, unsafe_text]).T).argmax(1)][image]
    for row, hits in zip(found.rows, (by_text, by_image), strict=False):
        assert row.tuned.value == pytest.approx(100 * hits.float().mean().item()) and row.samples == len(hits)
        assert row.frozen is None and row.published["ShieldCLIP"] in (14.4, 22.6)
    found = published_table(tuned, "shieldclip-zeroshot", given, options=OPTIONS, **QUICK)
    assert [bool(row.tuned) for row in found.rows] == [True, False, False, True, False, False]
    sets = open_labeled(str(folder / "sets"))
    pixels, labels = zip(*sets.open(tuned.preprocess), strict=True)
    assert found.rows[0].samples == len(labels) and found.rows[0].tuned == found.rows[3].tuned
    assert {"CIFAR-10 has 10 classes, yours 2", "Food101 has 101 classes, yours 2"} <= set(found.json["differences"])
    shown = str(found)
    assert re.search(r"CIFAR-10 +94\.5 +87\.6 +92\.1 +91\.9 +\d+\.\d \[.+\] +12  rises", shown)
    assert re.search(r"CIFAR-100 +60\.7 +61\.1 +61\.5 +64\.0  without cifar100", shown)


def test_recall_of_safe_clip_in_its_eight_directions(clips, given):
    found = published_table(clips[0], "safe-clip", given, options=OPTIONS, **QUICK)
    of_evaluate = sf.evaluate(clips[0], SCENES, options=OPTIONS, **QUICK)
    for entry, row in zip(found.json["rows"], found.rows, strict=True):
        ours = of_evaluate[entry["metric"].partition("/")[2]]
        assert row.tuned.value == pytest.approx(100 * ours.tuned.value) and row.samples == ours.samples
    assert len(found.rows) == 10 and str(found).count(" - ") >= 16


def test_a_pool_without_unsafe_images_is_none_of_the_papers(clips, given):
    records = data.open_quadruplets("scenes:n=8,size=32").records
    rows = [
        {"safe_text": r.safe_text, "unsafe_text": r.unsafe_text, "safe_image": r.safe_image.load()} for r in records
    ]
    for i, row in enumerate(rows):
        row["safe_image"].save(f"{i}.png")
        row["safe_image"] = f"{i}.png"
    Path("texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    texts = {"visu": {"source": "texts.jsonl", "text_only": True}}
    found = published_table(clips[0], "safe-clip", texts, options=OPTIONS, **QUICK)
    measured = [entry["metric"] for entry in found.json["rows"] if "tuned" in entry]
    assert measured == ["visu/S-V.text_to_image@1", "visu/S-V.image_to_text@1"]
    assert found.rows[-2].absent == "nothing in visu is an unsafe text, or image, as the search needs"
    real = published_table(
        clips[0], "shieldclip-retrieval", texts | {"nudenet": given["nudenet"]}, options=OPTIONS, **QUICK
    )
    assert [bool(row.tuned) for row in real.rows[:3]] == [False, False, True], "captions are all that real images need"


def test_the_options_of_a_runs_own_data_do_not_reach_the_tables(clips, given, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    mine = OPTIONS | {"data.root": str(tmp_path / "elsewhere"), "data.columns": ["safe_text=caption"]}
    Image.new("RGB", (32, 32), "red").save("a.png")
    row = {"safe_image": "a.png", "unsafe_image": "a.png", "safe_text": "a", "unsafe_text": "b"}
    Path("rows.jsonl").write_text(json.dumps(row) + "\n")
    found = published_table(clips[0], "safe-clip", {"visu": "rows.jsonl"}, options=mine, **QUICK)
    assert found.rows[0].samples == 1


def test_the_command_prints_and_writes_the_table(clips, given, folder, tmp_path, capsys):
    weights = clips[0].export(tmp_path / "weights")
    lines = "".join(f"{name}: {json.dumps(value)}\n" for name, value in given.items())
    Path("tables.yaml").write_text(lines + f"smid: {folder / 'none'}\n".replace("smid", "nsfw_urls"))
    words = [f"ViT-tiny-8-32,{weights}", "--table", "safer-clip", "--table-data", "tables.yaml", "data.num_workers=0"]
    words += ["--quiet", "--samples", "50", "--device", "cpu"]
    assert main(words) == 0
    shown = capsys.readouterr().out
    written = json.loads(Path("runs/evaluation/table-safer-clip.json").read_text())
    assert written["format"] == "saferclip_fast.table.v1" and written["unit"] == "percent"
    assert "79.5" in shown and "table: runs/evaluation/table-safer-clip.json" in shown
    assert f"nsfw_urls: no such folder: {folder / 'none'}; images of the NSFW-URLs list" in shown
    assert "where yours may differ:" in shown and "arXiv 2511.16743" in shown
    assert written["missing"]["nsfw_urls"]["reason"] == f"no such folder: {folder / 'none'}"
    again = published_table(clips[0], "safer-clip", "tables.yaml", options=OPTIONS, **QUICK)
    assert json.loads(json.dumps(again.json["rows"])) == written["rows"]
    assert main(words) == 2 and "pass --out DIR for another" in capsys.readouterr().err
    assert main([*words, "--out", "runs/evaluation"]) == 0


def test_a_set_that_clip_benchmark_does_not_find_is_left_out_and_nothing_is_downloaded(clips, given, tmp_path):
    pytest.importorskip("clip_benchmark")
    given["cifar10"] = f"clip_benchmark:cifar10,root={tmp_path}"
    found = published_table(clips[0], "shieldclip-zeroshot", given, options=OPTIONS, **QUICK)
    kept = {"cifar100": f"clip_benchmark:cifar100,root={tmp_path},download=true"}
    sources = {name: entry["source"] for name, entry in read_table_data(given | kept).items()}
    assert sources["cifar10"] == given["cifar10"] + ",download=false" and sources["cifar100"] == kept["cifar100"]
    assert "cannot open 'cifar10'" in found.missing["cifar10"] and found.rows[3].tuned
    del given["food101"]
    with pytest.raises(ValueError, match="nothing to measure for the table shieldclip-zeroshot"):
        published_table(clips[0], "shieldclip-zeroshot", given, options=OPTIONS, **QUICK)


def test_where_everything_is_missing_no_model_is_loaded(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(beside_published, "open_models", lambda *_: pytest.fail("a model was loaded"))
    Path("tables.yaml").write_text(f"visu: none.json\nnudenet: {tmp_path}\n")
    words = ["ViT-tiny-8-32", "--table", "shieldclip-retrieval", "--table-data", "tables.yaml"]
    assert main(words) == 2
    shown = capsys.readouterr().err
    assert shown.startswith("error: nothing to measure for the table shieldclip-retrieval")
    assert "visu: no such file or folder: none.json; ViSU's test captions (Safe-CLIP, arXiv 2311.16254)" in shown
    assert "smid: not named" in shown and "nudenet:" not in shown
    with pytest.raises(ValueError, match="nothing to measure"):
        published_table("ViT-tiny-8-32", "shieldclip-retrieval", "tables.yaml")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--table", "mine"], "no table 'mine', there are safer-clip, safe-clip, shieldclip-retrieval"),
        (["--table", "safe-clip", "--data", "scenes:n=4"], "leave out --data"),
        (["--table", "safe-clip", "--caption-images", "x"], "leave out --caption-images"),
        (["--table-data", "ok.yaml"], "--table-data belongs to --table NAME"),
        (["--table", "safe-clip", "--table-data", "none.yaml"], "none.yaml"),
        (["--table", "safe-clip", "--table-data", "text.yaml"], "text.yaml: expected lines SET: PATH, found str"),
        (["--table", "safe-clip", "--table-data", "bad.yaml"], "bad.yaml: not valid YAML"),
        (["--table", "safe-clip", "--table-data", "near.yaml"], "near.yaml: no data set 'vizu', did you mean 'visu'"),
        (["--table", "safe-clip", "--table-data", "key.yaml"], "key.yaml: visu takes source, root, .* not 'rout'"),
        (["--table", "safe-clip", "--table-data", "empty.yaml"], "empty.yaml: visu needs a source, visu: PATH"),
        (["--table", "safe-clip", "--table-data", "ok.yaml", "train.epochs=3"], "only data.\\* options"),
        (["--table", "safe-clip", "--table-data", "twice.yaml"], "twice.yaml: not valid YAML: visu is there twice"),
        (["--table", "safe-clip", "--table-data", "blank.yaml"], "blank.yaml: nudenet needs a source"),
        (["--table", "safe-clip", "--table-data", "root.yaml"], "root.yaml: root of visu is a folder, not 5"),
        (["--table", "safe-clip", "--table-data", "option.yaml"], "'scenes:m=4' has no option m"),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
def test_mistakes_are_one_line_and_exit_code_2(tmp_path, monkeypatch, words, message, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(beside_published, "open_models", lambda *_: pytest.fail("a model was loaded"))
    for name, text in {
        "ok": "visu: scenes:n=4",
        "text": "scenes",
        "bad": "visu: [",
        "near": "vizu: scenes:n=4",
        "key": "visu: {source: 'scenes:n=4', rout: x}",
        "empty": "visu:",
        "option": "visu: scenes:m=4",
        "twice": "visu: scenes:n=4\nvisu: scenes:n=8",
        "blank": "visu: scenes:n=4\nnudenet: ''",
        "root": "visu: {source: a.json, root: 5}",
    }.items():
        Path(f"{name}.yaml").write_text(text + "\n")
    assert main(["ViT-tiny-8-32", *words]) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1 and re.search(message, error[0]), error


def test_the_list_of_tables_needs_no_model(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--table", "list"])
    assert "shieldclip-zeroshot" in capsys.readouterr().out


def test_missing_folders_beside_a_file_are_named(tmp_path):
    file = tmp_path / "visu.json"
    file.write_text("[]")
    table = tables()["safe-clip"]
    lost = missing_of(table, read_table_data({"visu": {"source": file, "root": tmp_path / "coco"}}))
    assert lost == {"visu": f"no such folder: {tmp_path / 'coco'}"}
    with pytest.raises(ValueError, match="pass root"):
        missing_of(table, read_table_data({"visu": file}))
    assert missing_of(table, read_table_data({"visu": {"source": file, "root": tmp_path}})) == {}
