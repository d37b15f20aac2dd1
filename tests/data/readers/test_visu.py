"""ViSU's JSON layout with a COCO root, and NSFWCaps' with a NoCaps root."""

import json
from pathlib import Path
from typing import Any

import pytest

from saferclip_fast.data import DataError, open_quadruplets
from tests.support.quadruplet_files import image_bytes

COCO_ID = 391895


@pytest.fixture
def coco(tmp_path: Path) -> Path:
    for folder, name in (("train2017", COCO_ID), ("val2017", 522418)):
        (tmp_path / "coco" / folder).mkdir(parents=True)
        (tmp_path / "coco" / folder / f"{name:012d}.jpg").write_bytes(image_bytes(name, fmt="JPEG"))
    (tmp_path / "made").mkdir()
    for entry in (0, 1):
        (tmp_path / "made" / f"{entry}.png").write_bytes(image_bytes(entry))
    return tmp_path / "coco"


def entries() -> dict[str, dict[str, Any]]:
    return {
        "0": {"safe": "a dog", "nsfw": "a dog on fire", "coco_id": COCO_ID, "tag": "fire", "nsfw_im_path": "0.png"},
        "1": {"safe": "a cat", "nsfw": "a cat on fire", "coco_id": 522418, "tag": "fire", "nsfw_im_path": "1.png"},
    }


def write(tmp_path: Path, content: Any) -> Path:
    path = tmp_path / "visu.json"
    path.write_text(json.dumps(content))
    return path


@pytest.mark.parametrize("layout", ["object", "info and data", "list"])
def test_layouts(tmp_path: Path, coco: Path, layout: str) -> None:
    content: Any = entries()
    if layout == "info and data":
        content = {"info": {"version": 1}, "data": content}
    elif layout == "list":
        content = [{"incremental_id": int(key), **value} for key, value in content.items()]
    data = open_quadruplets(write(tmp_path, content), root=coco, unsafe_root=tmp_path / "made")
    assert [(r.safe_text, r.unsafe_text, r.row) for r in data.records] == [
        ("a dog", "a dog on fire", 0),
        ("a cat", "a cat on fire", 1),
    ]
    assert data.records[0].safe_image.content() == image_bytes(COCO_ID, fmt="JPEG")
    assert data.records[1].unsafe_image.content() == image_bytes(1)
    assert data[1]["unsafe_text_label"] == 1


def test_the_public_text_release_with_images_named_by_entry(tmp_path: Path, coco: Path) -> None:
    content = entries()
    for entry in content.values():
        del entry["nsfw_im_path"]
    path = write(tmp_path, content)
    data = open_quadruplets(path, root=coco, unsafe_root=tmp_path / "made", unsafe_image="{id}.png")
    assert data.records[1].unsafe_image.content() == image_bytes(1)
    with pytest.raises(DataError, match=r"captions only.*data.unsafe_image=\{id\}.png"):
        open_quadruplets(path, root=coco)


def nsfwcaps(url: Any = "https://s3.amazonaws.com/nocaps/val/0013ea2087020901.jpg?v=1") -> list[dict[str, Any]]:
    texts = {"caption": "a vase", "nsfw_caption": "a vase on fire", "chosen_category": "fire"}
    return [{"image_coco_url": "val/4a.jpg", **texts}, {"image_coco_url": url, **texts}]


@pytest.mark.parametrize("name", ["{id}.png", "{name}.png"])
def test_nsfwcaps_with_images_named_by_entry_or_by_the_safe_image(tmp_path: Path, name: str) -> None:
    for seed, image in enumerate(("4a", "0013ea2087020901")):
        for folder, file in (("nocaps", f"{image}.jpg"), ("made", name.format(id=seed, name=image))):
            (tmp_path / folder).mkdir(exist_ok=True)
            (tmp_path / folder / file).write_bytes(image_bytes(seed + 2 * (folder == "made")))
    path = write(tmp_path, nsfwcaps())
    data = open_quadruplets(path, root=tmp_path / "nocaps", unsafe_root=tmp_path / "made", unsafe_image=name)
    assert [(r.safe_text, r.unsafe_text, r.row) for r in data.records] == [
        ("a vase", "a vase on fire", 0),
        ("a vase", "a vase on fire", 1),
    ]
    assert [r.safe_image.content() for r in data.records] == [image_bytes(0), image_bytes(1)]
    assert [r.unsafe_image.content() for r in data.records] == [image_bytes(2), image_bytes(3)]


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("http://host/none.jpg", "safe_image: missing image .*none.jpg"),
        ("http://host/..", "leaves its root folder"),
        ("http://host/", "image path is empty"),
        (7, "missing image"),
        (None, "no safe_image"),
    ],
)
def test_bad_nsfwcaps_entries(tmp_path: Path, url: Any, message: str) -> None:
    for name in ("4a.jpg", "0.png", "1.png"):
        (tmp_path / name).write_bytes(image_bytes(0))
    with pytest.raises(DataError, match=rf"visu.json, row 1: .*{message}"):
        open_quadruplets(write(tmp_path, nsfwcaps(url)), root=tmp_path, unsafe_image="{id}.png")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"coco_id": 7}, "000000000007.jpg is not in train2017, val2017 or test2017"),
        ({"coco_id": "../../etc"}, "coco_id must be a whole number"),
        ({"coco_id": -5}, "coco_id must be a whole number"),
        ({"coco_id": True}, "coco_id must be a whole number"),
        ({"coco_id": "9" * 5000}, "coco_id must be a whole number"),
        ({"coco_id": None}, "no safe_image"),
        ({"safe": ""}, "safe_text is empty"),
        ({"nsfw": None}, "no unsafe_text"),
        ({"nsfw_im_path": "/cluster/1.png"}, "absolute image path"),
        ({"nsfw_im_path": "../1.png"}, "leaves its root folder"),
    ],
)
def test_bad_entries_name_file_and_key(tmp_path: Path, coco: Path, change: dict, message: str) -> None:
    content = entries()
    content["1"].update(change)
    path = write(tmp_path, content)
    with pytest.raises(DataError, match=rf"visu.json, row 1: .*{message}"):
        open_quadruplets(path, root=coco, unsafe_root=tmp_path / "made")
    data = open_quadruplets(path, root=coco, unsafe_root=tmp_path / "made", on_error="skip", progress=False)
    assert len(data) == 1 and data.summary.skipped == 1


def test_a_key_that_is_no_number_of_an_entry_counts_as_none(tmp_path: Path, coco: Path) -> None:
    path = write(tmp_path, {"9" * 5000: entries()["1"]})  # more digits than Python turns into a number
    data = open_quadruplets(path, root=coco, unsafe_root=tmp_path / "made")
    assert [record.row for record in data.records] == [1]


def test_entries_that_are_no_objects(tmp_path: Path, coco: Path) -> None:
    path = write(tmp_path, {**entries(), "2": ["a"]})
    with pytest.raises(DataError, match="row 3: entry '2' must be an object, not list"):
        open_quadruplets(path, root=coco, unsafe_root=tmp_path / "made")


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"{", "visu.json is not JSON"), (b"7", "must hold an object or a list of entries of ViSU or NSFWCaps, not int")],
)
def test_bad_files(tmp_path: Path, coco: Path, content: bytes, message: str) -> None:
    path = tmp_path / "visu.json"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        open_quadruplets(path, root=coco)
    with pytest.raises(ValueError, match="is read as ViSU or NSFWCaps: pass root"):
        open_quadruplets(path)
    with pytest.raises(DataError, match=r"no such file or folder: .*none.json"):
        open_quadruplets(tmp_path / "none.json", root=coco)


@pytest.mark.parametrize("pattern", ["{idx}.png", "made.png", "{id}-{}.png"])
def test_a_pattern_that_cannot_name_images_is_refused_before_any_is_looked_for(
    tmp_path: Path, coco: Path, pattern: str
) -> None:
    with pytest.raises(ValueError, match=r"unsafe_image=.* must tell entries apart by \{id\}, \{coco_id\}, \{name\}"):
        open_quadruplets(write(tmp_path, entries()), root=coco, unsafe_image=pattern)


def test_a_number_that_two_entries_have_is_refused(tmp_path: Path, coco: Path) -> None:
    text = json.dumps(entries())
    (tmp_path / "visu.json").write_text(text[:-1] + ', "0": {}}')
    with pytest.raises(DataError, match="the name '0' stands twice"):
        open_quadruplets(tmp_path / "visu.json", root=coco)
    path = write(tmp_path, [{"incremental_id": 7, **entry} for entry in entries().values()])
    with pytest.raises(DataError, match="two entries have the number 7"):
        open_quadruplets(path, root=coco)
