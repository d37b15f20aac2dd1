"""Parquet files and what `datasets` saves, with images inside: the same samples as from files, bad ones named."""

import json
import shutil
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from torch.utils.data import DataLoader

from saferclip_fast.data import DataError, ImageError, QuadrupletDataset, open_quadruplets
from saferclip_fast.data.batches import Collate
from tests.support.quadruplet_files import image_bytes, write_rows

IMAGES = ("safe_image", "unsafe_image")


@pytest.fixture
def files(rows: list[dict], tmp_path: Path) -> QuadrupletDataset:
    """The rows as files, which every other way must equal."""
    return open_quadruplets(write_rows(tmp_path / "reference.jsonl", rows))


@pytest.fixture(autouse=True)
def in_its_own_folder(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)  # where .cache goes


def held(rows: list[dict], root: Path) -> list[dict]:
    """The rows with {bytes, path} in place of paths."""
    return [r | {n: {"bytes": (root / r[n]).read_bytes(), "path": r[n]} for n in IMAGES} for r in rows]


def saved(rows: list[dict], root: Path) -> datasets.Dataset:
    features = {name: datasets.Value("string") for name in ("safe_text", "unsafe_text")}
    features |= {name: datasets.Image() for name in IMAGES}
    texts = {name: [row[name] for row in rows] for name in ("safe_text", "unsafe_text")}
    images = {name: [str(root / row[name]) for row in rows] for name in IMAGES}
    return datasets.Dataset.from_dict({**texts, **images}, datasets.Features(features))


def assert_same(found: QuadrupletDataset, wanted: QuadrupletDataset) -> None:
    assert found.content_hash() == wanted.content_hash()
    assert found.summary.read == found.summary.kept == len(wanted)
    for index in (2, 0, 3):
        assert found[index]["unsafe_image"].equal(wanted[index]["unsafe_image"])


def test_a_data_set_that_datasets_saved(rows, files, tmp_path):
    saved(rows, tmp_path).save_to_disk(str(tmp_path / "saved"), num_shards=2)
    assert_same(open_quadruplets(tmp_path / "saved"), files)
    datasets.DatasetDict(train=saved(rows, tmp_path)).save_to_disk(str(tmp_path / "dict"))
    assert_same(open_quadruplets(tmp_path / "dict"), files)
    assert_same(open_quadruplets(tmp_path / "dict" / "train"), files)
    assert not (tmp_path / ".cache").exists()  # they are read where they lie


def test_its_rows_may_be_a_selection_in_another_order(rows, tmp_path):
    saved(rows, tmp_path).select([3, 1]).save_to_disk(str(tmp_path / "saved"))
    data = open_quadruplets(tmp_path / "saved")
    assert [record.safe_text for record in data.records] == [rows[3]["safe_text"], rows[1]["safe_text"]]


@pytest.mark.parametrize("way", ["datasets", "struct", "bytes", "large_bytes"])
def test_images_inside_parquet(rows, files, tmp_path, way):
    path = tmp_path / "data.parquet"
    if way == "datasets":
        with_bytes = {name: [row[name] for row in held(rows, tmp_path)] for name in rows[0]}
        datasets.Dataset.from_dict(with_bytes, saved(rows, tmp_path).features).to_parquet(str(path))
    else:
        inside = held(rows, tmp_path)
        if way != "struct":
            inside = [row | {name: row[name]["bytes"] for name in IMAGES} for row in inside]
        table = pa.Table.from_pylist(inside)
        if way == "large_bytes":
            for name in IMAGES:
                place = table.schema.get_field_index(name)
                table = table.set_column(place, name, table[name].cast(pa.large_binary()))
        pq.write_table(table, path, row_group_size=3)
    assert_same(open_quadruplets(path, cache_dir=tmp_path / "cache"), files)
    assert len(list((tmp_path / "cache").glob("images-*.arrow"))) == 1


def test_a_folder_a_glob_and_braces_of_parquet_files(rows, files, tmp_path):
    for number, part in enumerate((rows[:1], rows[1:])):
        pq.write_table(pa.Table.from_pylist(held(part, tmp_path)), tmp_path / f"part-{number}.parquet")
    (tmp_path / "folder").mkdir()
    for path in tmp_path.glob("part-*.parquet"):
        shutil.copy(path, tmp_path / "folder")
    for source in ("folder", "part-*.parquet", "part-{0,1}.parquet"):
        assert_same(open_quadruplets(tmp_path / source), files)
    with pytest.raises(DataError, match=r"no such file or folder: .*part-2.parquet"):
        open_quadruplets(tmp_path / "part-{0..2}.parquet")


def test_the_copy_is_made_once_and_again_where_the_file_changes(rows, files, tmp_path):
    path = tmp_path / "data.parquet"
    pq.write_table(pa.Table.from_pylist(held(rows, tmp_path)), path)
    for _ in range(2):
        assert_same(open_quadruplets(path, cache_dir=tmp_path / "cache", on_error="skip"), files)
    assert sorted(p.suffix for p in (tmp_path / "cache").iterdir()) == [".arrow", ".json"]
    changed = held(rows, tmp_path)
    changed[0]["safe_image"]["bytes"] = image_bytes(99)
    pq.write_table(pa.Table.from_pylist(changed), path)
    assert open_quadruplets(path, cache_dir=tmp_path / "cache").content_hash() != files.content_hash()


def test_loader_processes_read_them(rows, files, tmp_path):
    saved(rows, tmp_path).save_to_disk(str(tmp_path / "saved"))
    collate = Collate(lambda texts: files[0]["safe_image"].new_ones(len(texts), 4).long())
    for batch in DataLoader(open_quadruplets(tmp_path / "saved"), 2, num_workers=2, collate_fn=collate):
        for place, index in enumerate(batch["index"].tolist()):
            assert batch["safe_image"][place].equal(files[index]["safe_image"])


def test_rows_without_bytes_have_their_path_or_nothing(rows, files, tmp_path):
    mixed = held(rows, tmp_path)
    mixed[1]["safe_image"]["bytes"] = None
    mixed[2]["unsafe_image"] = None
    mixed[3]["unsafe_image"] = {"bytes": None, "path": "../outside.png"}
    path = tmp_path / "data.parquet"
    pq.write_table(pa.Table.from_pylist(mixed), path)
    data = open_quadruplets(path, on_error="skip")
    assert [r.row for r in data.records] == [1, 2]
    assert data[1]["safe_image"].equal(files[1]["safe_image"])
    assert data.summary.problems == [
        f"{path}, row 3: no unsafe_image",
        f"{path}, row 4: unsafe_image: image path '../outside.png' leaves its root folder {str(tmp_path)!r}",
    ]


def test_bytes_go_through_the_same_decoder(rows, tmp_path):
    bad = held(rows, tmp_path)
    bad[1]["safe_image"]["bytes"] = b"%!PS-Adobe-3.0 EPSF-3.0"
    bad[2]["unsafe_image"]["bytes"] = b""
    path = tmp_path / "data.parquet"
    pq.write_table(pa.Table.from_pylist(bad), path)
    data = open_quadruplets(path, on_error="skip")
    assert [r.row for r in data.records] == [1, 4]
    first, second = data.summary.problems
    assert first.startswith(f"{path}, row 2: broken image {path}, row 2, safe_image: not a JPEG, PNG,")
    assert second == f"{path}, row 3: broken image {path}, row 3, unsafe_image: the file is empty"
    with pytest.raises(ImageError, match="more than max_pixels=50"):
        open_quadruplets(path).records[0].safe_image.load(50)


def damaged(folder: Path, name: str, content: object) -> Path:
    shutil.copytree(folder, folder.with_name("damaged"))
    text = content if isinstance(content, str) else json.dumps(content)
    (folder.with_name("damaged") / name).write_text(text)
    return folder.with_name("damaged")


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("state.json", "{", r"cannot read .*state.json: Expecting"),
        ("state.json", {}, r"state.json names no data files of its folder: save the data set again"),
        ("state.json", {"_data_files": [{"filename": "../x.arrow"}]}, r"state.json names no data files of its folder"),
        ("state.json", {"_data_files": [{"filename": "x.arrow"}]}, r"lacks x.arrow, which its state.json names"),
        ("state.json", {"_indices_data_files": [{}]}, r"holds a selection of its rows: save the result of"),
        ("dataset_dict.json", {"splits": ["train", "test"]}, r"holds the splits train, test: give one, e.g. .*/train"),
        ("dataset_dict.json", {"splits": ["../saved"]}, r"dataset_dict.json names no splits"),
        ("dataset_dict.json", {"splits": ["train"]}, r"train has no state.json"),
        ("data-00000-of-00001.arrow", "no arrow", r"arrow is not a readable Arrow file of `datasets`: "),
    ],
)
def test_a_damaged_folder_is_refused_by_name(rows, tmp_path, name, content, message):
    saved(rows, tmp_path).save_to_disk(str(tmp_path / "saved"))
    with pytest.raises(DataError, match=message) as caught:
        open_quadruplets(damaged(tmp_path / "saved", name, content))
    assert "\n" not in str(caught.value)


def test_a_damaged_name_inside_is_a_bad_image(rows, tmp_path):
    """Found by fuzzing: the name of a part of an image's column is no UTF-8."""
    saved(rows, tmp_path).save_to_disk(str(tmp_path / "saved"))
    file = tmp_path / "saved" / "data-00000-of-00001.arrow"
    file.write_bytes(file.read_bytes().replace(b"\x04\x00\x00\x00path\x00", b"\x04\x00\x00\x00\x90ath\x00"))
    with pytest.raises(DataError, match=r"saved/data-00000-of-00001.arrow.*cannot read image|is not a readable Arrow"):
        open_quadruplets(tmp_path / "saved", verify=True)


def test_splits_and_missing_parts_are_not_mixed_in_silence(rows, tmp_path):
    for name in ("train-00000-of-00002", "train-00001-of-00002", "test-00000-of-00001"):
        pq.write_table(pa.Table.from_pylist(held(rows, tmp_path)), tmp_path / f"{name}.parquet")
    with pytest.raises(DataError, match=r"holds test, train: give one, e.g. .*/test-\*.parquet"):
        open_quadruplets(tmp_path)
    assert len(open_quadruplets(tmp_path / "train-*.parquet")) == 8
    with pytest.raises(DataError, match=r"lacks 2 of the 4 files that their names count"):
        for number in range(2):
            (tmp_path / f"train-0000{number}-of-00002.parquet").rename(
                tmp_path / f"train-0000{number}-of-00004.parquet"
            )
        open_quadruplets(tmp_path / "train-*.parquet")
    (tmp_path / "train-00001-of-00004.parquet").unlink()
    with pytest.raises(DataError, match=r"lacks 3 of the 4 files that their names count"):
        open_quadruplets(tmp_path / "train-*.parquet")
    assert len(open_quadruplets(tmp_path / "train-00000-of-00004.parquet")) == 4, "one that was asked for by its name"


def test_columns_of_other_kinds_and_missing_ones_are_named(rows, tmp_path):
    path = tmp_path / "data.parquet"
    pq.write_table(pa.Table.from_pylist([row | {"safe_image": [1, 2]} for row in rows]), path)
    with pytest.raises(
        DataError, match=r"column 'safe_image' holds list<.*: an image is a path, the bytes of an image"
    ):
        open_quadruplets(path)
    saved(rows, tmp_path).rename_column("safe_text", "caption").save_to_disk(str(tmp_path / "saved"))
    with pytest.raises(DataError, match=r"\.arrow has no column 'safe_text'; its columns are .*'caption'"):
        open_quadruplets(tmp_path / "saved")
    assert len(open_quadruplets(tmp_path / "saved", columns={"safe_text": "caption"})) == 4
