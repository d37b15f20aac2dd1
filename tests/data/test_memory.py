"""Data in memory: whatever holds the rows, a run finds the same samples again."""

import io
import json
from decimal import Decimal
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from saferclip_fast import data
from saferclip_fast.data.memory import keep
from saferclip_fast.embeddings import embed_quadruplets

TEXTS = ("safe_text", "unsafe_text")
IMAGES = ("safe_image", "unsafe_image")


def pixels(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (6, 5, 3), dtype=np.uint8)


def rows(count: int = 3) -> list[dict]:
    return [
        {
            "safe_image": Image.fromarray(pixels(2 * i)),
            "unsafe_image": Image.fromarray(pixels(2 * i + 1)),
            "safe_text": f"a dog {i}",
            "unsafe_text": f"a fire {i}",
            "unsafe_image_label": i % 2,
        }
        for i in range(count)
    ]


def encoded(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def opened(kept, **options):
    return data.open_quadruplets(kept.source, root=kept.root or None, **options)


def assert_same(found, wanted=None):
    wanted = wanted or rows()
    assert len(found) == len(wanted)
    for record, row in zip(found.records, wanted, strict=True):
        assert [getattr(record, name) for name in TEXTS] == [row[name] for name in TEXTS]
        assert (record.unsafe_text_label, record.unsafe_image_label) == (1, row["unsafe_image_label"])
        for name in IMAGES:
            assert np.array_equal(np.asarray(getattr(record, name).load()), np.asarray(row[name]))


class Samples(torch.utils.data.Dataset):
    """The protocol, and nothing more: it ends where its length says, and iterating would not end."""

    def __init__(self, items):
        self.items = items

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        return self.items[index % len(self.items)]


def as_arrays(items):
    return [row | {name: np.asarray(row[name]) for name in IMAGES} for row in items]


def as_bytes(items):
    return [row | {name: encoded(row[name]) for name in IMAGES} for row in items]


def as_features(items):
    return [row | {name: {"bytes": encoded(row[name]), "path": None} for name in IMAGES} for row in items]


def as_frame(items):
    return pytest.importorskip("pandas").DataFrame(items)


def as_records(items):
    def record(row):
        safe, unsafe = (data.ImageArray(np.asarray(row[name])) for name in IMAGES)
        return data.Quadruplet(safe, row["safe_text"], unsafe, row["unsafe_text"], 1, row["unsafe_image_label"])

    return data.QuadrupletDataset([record(row) for row in items])


@pytest.mark.parametrize("form", [list, Samples, as_arrays, as_bytes, as_features, as_frame, as_records])
def test_whatever_holds_the_rows_they_are_found_again(form, tmp_path):
    assert_same(opened(keep(form(rows()), tmp_path, progress=False)))


@pytest.mark.parametrize("kind", [torch.tensor, np.array, np.float32, Decimal])
def test_labels_of_any_kind_of_number_are_found_again(kind, tmp_path):
    wanted = [0, 0.25, 1]
    items = [row | {"unsafe_image_label": kind(label)} for row, label in zip(rows(), wanted, strict=True)]
    found = opened(keep(Samples(items), tmp_path, progress=False))
    assert [record.unsafe_image_label for record in found.records] == wanted


def test_a_label_of_another_kind_is_a_bad_one_and_none_that_is_missing(tmp_path):
    items = [row | {"unsafe_image_label": torch.tensor([0])} for row in rows()]
    with pytest.raises(data.DataError, match=r"unsafe_image_label must lie between 0 .*tensor\(\[0\]\)"):
        opened(keep(items, tmp_path, progress=False))


def test_equal_data_is_written_once_and_nothing_that_is_there_changes(tmp_path):
    first = keep(rows(), tmp_path, progress=False)
    files = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    assert keep(rows(), tmp_path, progress=False) == first
    assert keep(rows(2), tmp_path, progress=False).source != first.source
    assert files.items() <= {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}.items()
    assert_same(opened(first))


@pytest.mark.parametrize("root", ["", "pictures"])
def test_paths_stay_paths(root, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / root).mkdir(exist_ok=True)
    items = rows()
    for i, row in enumerate(items):
        for name in IMAGES:
            row[name].save(tmp_path / root / f"{name}-{i}.png")
    written = [row | {name: f"{name}-{i}.png" for name in IMAGES} for i, row in enumerate(items)]
    kept = keep(written, tmp_path / "kept", root=root, progress=False)
    assert kept.root == (root or ".") and not (tmp_path / "kept" / "images").exists()
    assert_same(opened(kept), items)


def test_missing_values_are_bad_rows_as_in_a_file(tmp_path):
    items = rows(5)
    items[0]["safe_text"], items[1]["unsafe_text"], items[2]["safe_image"] = None, float("nan"), None
    items[3]["unsafe_image_label"] = float("nan")  # as pandas fills a column
    items[3]["unsafe_text_label"] = np.float32("nan")
    kept = keep(items, tmp_path, progress=False)
    assert "NaN" not in Path(kept.source).read_text()  # which is no JSON
    found = opened(kept, on_error="skip")
    assert [record.row for record in found.records] == [4, 5] and found.summary.skipped == 3
    assert [record.unsafe_image_label for record in found.records] == [1, 0]


def test_columns_may_have_other_names(tmp_path):
    items = [{**{k: v for k, v in row.items() if k != "safe_text"}, "caption": row["safe_text"]} for row in rows()]
    kept = keep(items, tmp_path, {"safe_text": "caption"}, progress=False)
    assert_same(opened(kept, columns={"safe_text": "caption"}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda items: items.clear(), "the data has no rows"),
        (lambda items: [row.pop("safe_text") for row in items], "the data has no column 'safe_text'"),
        (lambda items: items[1].update(safe_image="a.png"), "row 2: safe_image is a path, and those before it are an"),
        (lambda items: items[2].update(unsafe_image=torch.rand(3, 4, 4)), "row 3: unsafe_image is a Tensor of torch.f"),
        (lambda items: items[0].update(safe_image=np.zeros((3, 4, 4))), "row 1: safe_image is a ndarray of float64"),
        (lambda items: items.append("x"), "row 4 is a str, not a dict with 'safe_image'"),
    ],
)
def test_what_is_no_row_is_named(change, message, tmp_path):
    items = rows()
    change(items)
    with pytest.raises(data.DataError) as raised:
        keep(items, tmp_path, progress=False)
    assert str(raised.value).startswith(message)


@pytest.mark.parametrize("value", [iter([]), {"safe_text": []}, 3])
def test_what_holds_no_rows_is_refused_with_what_does(value, tmp_path):
    with pytest.raises(data.DataError, match="give a path, a DataFrame, a list of dicts"):
        keep(value, tmp_path, progress=False)


def test_the_table_is_json_lines(tmp_path):
    kept = keep(rows(), tmp_path, progress=False)
    lines = [json.loads(line) for line in Path(kept.source).read_text().splitlines()]
    assert [line["safe_text"] for line in lines] == ["a dog 0", "a dog 1", "a dog 2"]


def test_a_data_set_of_ones_own_becomes_one_that_knows_its_content(tmp_path):
    own = Samples(rows())
    found = data.open_rows(own, tmp_path / "kept", progress=False, on_error="skip")
    assert_same(found)
    assert found.content_hash() == data.open_rows(rows(), tmp_path / "other", progress=False).content_hash()


@pytest.mark.parametrize("call", ["embed_quadruplets", "decode_images", "write_shards"])
def test_without_content_hash_the_way_is_named(tmp_path, call):
    own, message = (
        Samples(rows()),
        r"the data set is a Samples without content_hash, .* data.open_rows\(DATASET, FOLDER\)",
    )
    with pytest.raises(data.DataError, match=message):
        if call == "embed_quadruplets":
            embed_quadruplets(None, own, tmp_path)
        elif call == "decode_images":
            data.decode_images(own, tmp_path)
        else:
            data.write_shards(own, tmp_path / "shards")
    with pytest.raises(data.DataError, match=r"source is a Samples, not a path: data.open_rows\(DATA, FOLDER\)"):
        data.open_quadruplets(own)
