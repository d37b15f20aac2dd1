"""Image labels by a classifier: a fake one that sees redness, and NudeNet's own reading of arrays."""

import csv
import json
import re
import sys

import numpy as np
import pytest
from PIL import Image

from saferclip_fast import data
from saferclip_fast.label_images import label_table
from saferclip_fast.label_images.__main__ import main
from saferclip_fast.label_images.classifiers import NudeNet, open_classifier
from tests.support.quadruplet_files import write_rows

RED, BLUE = (255, 0, 0), (0, 0, 255)


class Redness:
    """Unsafe as far as the image is red; counts what it was shown."""

    def __init__(self, stop_after=None):
        self.seen, self.stop_after = 0, stop_after

    def __call__(self, images):
        if self.stop_after is not None and self.seen >= self.stop_after:
            raise KeyboardInterrupt
        self.seen += len(images)
        return [float(np.asarray(image)[:, :, 0].mean() / 255) for image in images]


@pytest.fixture
def rows(tmp_path):
    """Six rows; unsafe images of rows 0, 2, 4 are red, the others blue."""
    found = []
    for i in range(6):
        Image.new("RGB", (8, 8), BLUE if i % 2 else RED).save(tmp_path / f"{i}.png")
        found.append({"safe_image": "1.png", "safe_text": f"a, {i}", "unsafe_image": f"{i}.png", "unsafe_text": "é"})
    return found


def labels(path):
    return [record.unsafe_image_label for record in data.open_quadruplets(path).records]


def test_jsonl_and_csv_are_labeled_and_else_unchanged(rows, tmp_path):
    rows[0]["note"] = {"kept": [1, "é"]}
    write_rows(tmp_path / "t.jsonl", rows)
    counts = label_table(tmp_path / "t.jsonl", tmp_path / "new.jsonl", Redness(), progress=False)
    assert str(counts) == "3 unsafe images, 3 safe ones" and labels(tmp_path / "new.jsonl") == [1, 0, 1, 0, 1, 0]
    new = [json.loads(line) for line in (tmp_path / "new.jsonl").read_text().splitlines()]
    assert [{key: row[key] for key in row if "_image_" not in key} for row in new] == rows
    assert [row["unsafe_image_score"] for row in new] == [1, 0] * 3

    with (tmp_path / "t.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["safe_image", "unsafe_image", "safe_text", "bad", "unsafe_image_label"])
        writer.writerows([[row["safe_image"], row["unsafe_image"], row["safe_text"], "é", 1] for row in rows])
    command = [str(tmp_path / "t.csv"), "--out", str(tmp_path / "new.csv"), "--column", "unsafe_text=bad", "--quiet"]
    assert main([*command, "--classifier", f"{__name__}:Redness"]) == 0
    found = data.open_quadruplets(tmp_path / "new.csv", columns={"unsafe_text": "bad"}).records
    assert [record.unsafe_image_label for record in found] == [1, 0, 1, 0, 1, 0] and found[2].safe_text == "a, 2"


@pytest.mark.parametrize("named", [True, False], ids=["named by the entries", "named by a pattern"])
def test_visus_json_is_labeled_and_else_unchanged(rows, tmp_path, named):
    content = {"info": {"é": 1}, "data": {}}
    for i in range(6):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{i:012d}.jpg")
        content["data"][str(i)] = {"safe": "a", "nsfw": "b", "coco_id": i, "tag": "c"}
        content["data"][str(i)] |= {"nsfw_im_path": f"{i}.png"} if named else {}
    (tmp_path / "t.json").write_text(json.dumps(content))
    command = [str(tmp_path / "t.json"), "--out", str(tmp_path / "new.json"), "--quiet"]
    command += [] if named else ["--unsafe-image", "{id}.png"]
    assert main([*command, "--classifier", f"{__name__}:Redness"]) == 0
    new = json.loads((tmp_path / "new.json").read_text())
    found = data.open_quadruplets(tmp_path / "new.json", root=tmp_path, unsafe_image="{id}.png").records
    assert [record.unsafe_image_label for record in found] == [1, 0, 1, 0, 1, 0]
    assert [entry.pop("unsafe_image_score") for entry in new["data"].values()] == [1, 0] * 3
    for entry in new["data"].values():
        del entry["unsafe_image_label"]
    assert new == content


def test_a_broken_image_has_no_label_and_the_rest_goes_on(rows, tmp_path, capsys):
    (tmp_path / "3.png").write_bytes(b"GIF89a?")
    rows[5]["unsafe_image"] = "../5.png"
    write_rows(tmp_path / "t.jsonl", rows)
    counts = label_table(tmp_path / "t.jsonl", tmp_path / "new.jsonl", Redness(), progress=False)
    assert (counts.unsafe, counts.safe, counts.broken) == (3, 1, 2)
    assert "3.png" in capsys.readouterr().err
    written = [json.loads(line)["unsafe_image_label"] for line in (tmp_path / "new.jsonl").read_text().splitlines()]
    assert written == [1, 0, 1, "", 1, ""]


def stopped():
    return Redness(stop_after=0)


def test_a_killed_run_goes_on_and_never_leaves_half_a_table(rows, tmp_path, capsys):
    write_rows(tmp_path / "t.jsonl", rows)
    out = tmp_path / "new.jsonl"
    with pytest.raises(KeyboardInterrupt):
        label_table(tmp_path / "t.jsonl", out, Redness(stop_after=4), batch_size=2, progress=False)
    words = [str(tmp_path / "t.jsonl"), "--out", str(out), "--classifier", f"{__name__}:stopped", "--quiet"]
    assert main(words) == 130 and "the same command goes on" in capsys.readouterr().err
    assert not out.exists()
    scores = tmp_path / "new.jsonl.scores.jsonl"
    scores.write_text(scores.read_text()[:-9])  # torn in its last line
    Image.new("RGB", (9, 9), BLUE).save(tmp_path / "0.png")  # changed since
    rest = Redness()
    label_table(tmp_path / "t.jsonl", out, rest, batch_size=2, progress=False)
    assert rest.seen == 4, "two that were not seen, the torn one and the changed one"
    assert labels(out) == [0, 0, 1, 0, 1, 0] and not scores.exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["none.jsonl", "--out", "new.jsonl"], "cannot read .*none.jsonl"),
        (["t.jsonl", "--out", "t.jsonl"], "is the table itself: name a new file"),
        (["t.jsonl", "--out", "new.csv"], "must be of one format of .csv"),
        (["t.parquet", "--out", "new.parquet"], "must be of one format of .csv"),
        (["t.jsonl", "--out", "new.jsonl", "--column", "image=x"], r"columns renames \['image'\]"),
        (["bad.jsonl", "--out", "new.jsonl"], "bad.jsonl, row 2: not JSON"),
        (["bad.json", "--out", "new.json"], "bad.json, entry 0 must be an object, not int"),
        (["bad.json", "--out", "new.json", "--column", "unsafe_image=x"], "names of their own"),
        (["t.jsonl", "--out", "new.jsonl", "--classifier", "redness"], "write nudenet, or MODULE:FACTORY"),
        (["t.jsonl", "--out", "new.jsonl", "--classifier", "json:redness"], "has no attribute 'redness'"),
        (["t.jsonl", "--out", "new.jsonl", "--classifier", f"{__name__}:twos"], "not a probability each"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(rows, tmp_path, words, message, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "t.jsonl", rows)
    (tmp_path / "bad.jsonl").write_text((tmp_path / "t.jsonl").read_text().splitlines()[0] + "\n{\n")
    (tmp_path / "bad.json").write_text("[1]")
    before = (tmp_path / "t.jsonl").read_bytes()
    own = [] if "--classifier" in words else ["--classifier", f"{__name__}:Redness"]
    assert main([*words, *own, "--quiet"]) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ") and "\n" not in error and re.search(message, error), error
    assert (tmp_path / "t.jsonl").read_bytes() == before and not list(tmp_path.glob("new.*"))


def twos():
    return lambda images: [2.0] * len(images)


def test_nudenet_reads_arrays_as_it_reads_files(tmp_path, monkeypatch):
    from nudenet.nudenet import _read_image

    pixels = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "x.png")
    classifier = open_classifier("nudenet")
    assert classifier([Image.fromarray(pixels)]) == [0.0]  # the real detector finds nobody in noise
    given = []

    def detect(arrays, batch_size):
        given.extend(arrays)
        boxes = [{"class": "FACE_MALE", "score": 0.9}, {"class": "BUTTOCKS_EXPOSED", "score": 0.3}]
        return [boxes, boxes[:1]]

    monkeypatch.setattr(classifier.detector, "detect_batch", detect)
    assert classifier([Image.fromarray(pixels)] * 2) == [0.3, 0.0]
    assert np.array_equal(_read_image(given[0])[0], _read_image(str(tmp_path / "x.png"))[0])


def test_without_nudenet_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "nudenet", None)
    with pytest.raises(ImportError, match=r"pip install 'saferclip-fast\[evaluate\]'"):
        NudeNet()
    assert main(["t.csv", "--out", "n.csv"]) == 2


def test_bytes_that_are_no_text_come_back_as_they_were(tmp_path):
    Image.new("RGB", (8, 8), RED).save(tmp_path / "0.png")
    header = b"safe_image,unsafe_image,safe_text,unsafe_text,note\r\n"
    (tmp_path / "t.csv").write_bytes(header + b"0.png,0.png,a,b,\xff\xe9\r\n")
    label_table(tmp_path / "t.csv", tmp_path / "new.csv", Redness(), progress=False)
    assert (tmp_path / "new.csv").read_bytes().endswith(b"0.png,0.png,a,b,\xff\xe9,1.0,1\r\n")
