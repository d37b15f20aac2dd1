"""WebDataset shards: written, read back with random access, and damaged in every way."""

import json
import pickle
import tarfile
from pathlib import Path

import pytest
import webdataset

from saferclip_fast.data import DataError, SceneDataset, open_quadruplets, write_shards
from tests.support.quadruplet_files import image_bytes, write_rows, write_tar

TEXTS = {"safe_text": "a star", "unsafe_text": "a star on fire"}


def sample(key: str, **changes: bytes | None) -> dict[str, bytes]:
    members: dict[str, bytes | None] = {
        "safe_image.png": image_bytes(1),
        "unsafe_image.jpg": image_bytes(2, fmt="JPEG"),
        "json": json.dumps(TEXTS).encode(),
        **{name.replace("__", "."): data for name, data in changes.items()},
    }
    return {f"{key}.{name}": data for name, data in members.items() if data is not None}


def test_round_trip_keeps_content_and_order(tmp_path: Path, rows: list[dict]) -> None:
    rows[1]["unsafe_image_label"] = 0
    table = open_quadruplets(write_rows(tmp_path / "data.jsonl", rows))
    paths = write_shards(table, tmp_path / "shards", samples_per_shard=3, progress=False)
    assert [Path(path).name for path in paths] == ["000000.tar", "000001.tar"]
    data = open_quadruplets(tmp_path / "shards")
    assert data.content_hash() == table.content_hash() and data.summary.read == 4
    assert data[3]["safe_text"] == table[3]["safe_text"]  # random access
    again = write_shards(table, tmp_path / "again", samples_per_shard=3, progress=False)
    assert [Path(path).read_bytes() for path in paths] == [Path(path).read_bytes() for path in again]
    for source in (f"{tmp_path}/shards/*.tar", f"{tmp_path}/shards/{{000000..000001}}.tar"):
        assert open_quadruplets(source).content_hash() == table.content_hash()
    assert len(open_quadruplets(paths[1])) == 1


def test_rendered_scenes_are_stored_without_loss(tmp_path: Path) -> None:
    scenes = SceneDataset(n=5, mixed=0.5)
    write_shards(scenes, tmp_path, progress=False)
    data = open_quadruplets(tmp_path)
    for i in range(5):
        assert (data[i]["unsafe_image"] == scenes[i]["unsafe_image"]).all()
        assert data[i]["unsafe_text_label"] == scenes[i]["unsafe_text_label"]


def test_webdataset_reads_what_is_written(tmp_path: Path) -> None:
    [path] = write_shards(SceneDataset(n=3), tmp_path, progress=False)
    found = list(webdataset.WebDataset(path, shardshuffle=False))
    assert [item["__key__"] for item in found] == ["00000000", "00000001", "00000002"]
    assert {"safe_image.png", "unsafe_image.png", "json"} <= set(found[0])


def test_text_members_other_names_folders_and_unknown_members(tmp_path: Path) -> None:
    members = {
        **sample("a/0", json=None, safe_text__txt=b"a moon\n", unsafe_text__txt="a moon on fire \u2713".encode()),
        "a/readme": b"x",
        **sample("b/0", cls=b"3"),
    }
    data = open_quadruplets(write_tar(tmp_path / "x.tar", members))
    assert [record.safe_text for record in data.records] == ["a moon", "a star"]
    renamed = {name.replace("safe_image", "pic").replace("unpic", "bad"): value for name, value in sample("0").items()}
    path = write_tar(tmp_path / "y.tar", renamed)
    assert len(open_quadruplets(path, columns={"safe_image": "pic", "unsafe_image": "bad"})) == 1


def test_pickles_are_never_loaded(tmp_path: Path) -> None:
    class Boom:
        def __reduce__(self) -> tuple:
            return (exec, ("raise SystemExit('unpickled')",))

    bad = pickle.dumps(Boom())
    members = sample("0", safe_text__pyd=bad, json__pth=bad, safe_image__pkl=bad, pickle=bad)
    data = open_quadruplets(write_tar(tmp_path / "x.tar", members), verify=True, progress=False)
    assert data[0]["safe_text"] == "a star"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"safe_image__png": None}, "no safe_image"),
        ({"unsafe_image__jpg": None}, "no unsafe_image"),
        ({"json": None}, "no safe_text"),
        ({"json": b"{"}, "sample '/1': 1.json is not JSON"),
        ({"json": b"[]"}, "sample '/1': 1.json must be a JSON object, not list"),
        ({"json": b"\xff"}, "1.json is not UTF-8"),
        ({"json": b'"' + b"x" * (1 << 20) + b'"'}, "1.json has 1048578 bytes, more than 1048576"),
        ({"json": b'{"safe_text": " ", "unsafe_text": "b"}'}, "safe_text is empty"),
        ({"safe_text__txt": b""}, "safe_text is empty"),
        ({"json": json.dumps({**TEXTS, "unsafe_text_label": 3}).encode()}, "unsafe_text_label must lie between 0"),
    ],
)
def test_bad_samples_name_shard_and_row(tmp_path: Path, changes: dict, message: str) -> None:
    path = write_tar(tmp_path / "x.tar", {**sample("0"), **sample("1", **changes), **sample("2")})
    with pytest.raises(DataError, match=rf"x.tar, row 2: .*{message}"):
        open_quadruplets(path)
    data = open_quadruplets(path, on_error="skip", progress=False)
    assert len(data) == 2 and data.summary.read == 3 and data.summary.skipped == 1


def test_a_broken_image_inside_a_shard(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "x.tar", {**sample("0"), **sample("1", safe_image__png=b"junk")})
    with pytest.raises(DataError, match=r"x.tar, row 2: broken image .*x.tar!1.safe_image.png"):
        open_quadruplets(path, verify=True, progress=False)
    assert len(open_quadruplets(path, on_error="skip", progress=False)) == 1


def test_damaged_shards(tmp_path: Path) -> None:
    whole = write_tar(tmp_path / "whole.tar", {**sample("0"), **sample("1")})
    content = whole.read_bytes()
    cut = tmp_path / "cut.tar"
    with tarfile.open(whole) as archive:
        starts = [member.offset for member in archive]
    # Inside the data of a member, inside a header, and between two samples, where tarfile itself says nothing.
    for length, message in (
        (starts[4] + 600, "cut.tar: the file ends inside '1.unsafe_image.jpg'"),
        (starts[4] + 100, "cut.tar: no end-of-archive mark"),
        (starts[3], "cut.tar: no end-of-archive mark"),
    ):
        cut.write_bytes(content[:length])
        with pytest.raises(DataError, match=message):
            open_quadruplets(cut)
    cut.write_bytes(content[: starts[4]] + b"x" * 512 + content[starts[4] + 512 :])
    with pytest.raises(DataError, match="no end-of-archive mark"):
        open_quadruplets(cut)
    (tmp_path / "mixed").mkdir()
    for path in (whole, cut):
        path.rename(tmp_path / "mixed" / path.name)
    data = open_quadruplets(tmp_path / "mixed", on_error="skip", progress=False)
    assert len(data) == 3 and data.summary.reasons["bad shard"] == 1
    packed = write_tar(tmp_path / "z.tar", sample("0"), mode="w:gz")
    with pytest.raises(DataError, match=r"z.tar is not a readable tar file: .*compressed ones must be decompressed"):
        open_quadruplets(packed)
    (tmp_path / "none").mkdir()
    with pytest.raises(DataError, match=r"no .tar shard in .*none"):
        open_quadruplets(tmp_path / "none")


def test_links_inside_a_shard_are_ignored(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "x.tar", sample("0", safe_image__png=None))
    with tarfile.open(path, "a") as archive:
        link = tarfile.TarInfo("0.safe_image.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/hostname"
        archive.addfile(link)
    with pytest.raises(DataError, match="no safe_image"):
        open_quadruplets(path)


def test_bad_shard_size() -> None:
    with pytest.raises(ValueError, match="samples_per_shard must be at least 1"):
        write_shards(SceneDataset(n=1), "unused", samples_per_shard=0)


def test_a_byte_order_mark_does_not_enter_the_caption(tmp_path: Path) -> None:
    texts = {"safe_text__txt": b"\xef\xbb\xbfa moon", "unsafe_text__txt": b"\xef\xbb\xbfa moon on fire"}
    path = write_tar(tmp_path / "x.tar", {**sample("0", json=None, **texts), **sample("1", json=MARKED)})
    records = open_quadruplets(path).records
    assert [(r.safe_text, r.unsafe_text) for r in records] == [("a moon", "a moon on fire"), tuple(TEXTS.values())]


MARKED = b"\xef\xbb\xbf" + json.dumps(TEXTS).encode()


@pytest.mark.parametrize("case", ["unsorted", "dots in the keys"])
def test_what_a_sample_is_is_said_where_its_members_are_apart(tmp_path: Path, case: str) -> None:
    members = {**sample("0"), **sample("1")}
    if case == "unsorted":
        members = dict(sorted(members.items(), key=lambda item: item[0].partition(".")[2]))
    else:
        members = {name.replace("0.", "a.0."): data for name, data in members.items()}
    with pytest.raises(
        DataError, match=r"row 1: sample .*among its members .*a run of neighboring members with one key"
    ):
        open_quadruplets(write_tar(tmp_path / "x.tar", members))


def test_two_images_for_one_field_and_a_shard_named_twice_are_refused(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "x.tar", sample("0", safe_image__jpg=image_bytes(3, fmt="JPEG")))
    with pytest.raises(DataError, match=r"two images .*0.safe_image.jpg.*0.safe_image.png for one safe_image"):
        open_quadruplets(path)
    with pytest.raises(DataError, match="names a shard twice"):
        open_quadruplets(f"{tmp_path}/{{x,x}}.tar")
