"""ViSU's JSON layout with a COCO root."""

import json
from pathlib import Path
from typing import Any

import pytest

from saferclip_fast.data import DataError, open_quadruplets

from .quadruplet_files import image_bytes

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
    with pytest.raises(DataError, match=r"visu.json, row 0: no unsafe_image"):
        open_quadruplets(path, root=coco)


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


def test_entries_that_are_no_objects(tmp_path: Path, coco: Path) -> None:
    path = write(tmp_path, {**entries(), "2": ["a"]})
    with pytest.raises(DataError, match="row 3: entry '2' must be an object, not list"):
        open_quadruplets(path, root=coco, unsafe_root=tmp_path / "made")


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"{", "visu.json is not JSON"), (b"7", "must hold an object or a list of ViSU entries, not int")],
)
def test_bad_files(tmp_path: Path, coco: Path, content: bytes, message: str) -> None:
    path = tmp_path / "visu.json"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        open_quadruplets(path, root=coco)
    with pytest.raises(ValueError, match="is read as ViSU: pass root"):
        open_quadruplets(path)
    with pytest.raises(DataError, match=r"cannot read .*none.json: No such file"):
        open_quadruplets(tmp_path / "none.json", root=coco)
