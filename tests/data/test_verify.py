"""Broken images: found before training, skipped or fatal, remembered, and never a surprise in the middle."""

import os
from pathlib import Path

import pytest

from saferclip_fast.data import DataError, Quadruplet, QuadrupletDataset, images, open_quadruplets
from tests.support.quadruplet_files import image_bytes, write_rows


@pytest.fixture
def source(tmp_path: Path, rows: list[dict]) -> Path:
    """Rows 2 and 4 have broken images."""
    (tmp_path / "images" / "unsafe1.png").write_bytes(image_bytes(0)[:60])
    (tmp_path / "images" / "safe3.png").write_bytes(b"not an image")
    return write_rows(tmp_path / "data.jsonl", rows)


def texts(data: QuadrupletDataset) -> list[str]:
    return [data[i]["safe_text"] for i in range(len(data))]


def test_skipping_leaves_the_bad_rows_out_up_front(source: Path) -> None:
    data = open_quadruplets(source, on_error="skip", progress=False)
    assert texts(data) == ["a red circle number 0", "a red circle number 2"]
    assert [data[i]["index"] for i in range(2)] == [0, 1]
    assert str(data.summary) == f"{source}: 4 rows read, 2 kept, 2 skipped (2 bad image)"
    assert "data.jsonl, row 2: broken image" in data.summary.problems[0]
    assert "data.jsonl, row 4: broken image" in data.summary.problems[1]


def test_raising_stops_at_the_first_bad_row(source: Path) -> None:
    data = open_quadruplets(source)  # lazily: images are not decoded on opening
    assert len(data) == 4
    with pytest.raises(DataError, match=r"data.jsonl, row 2: broken image .*unsafe1.png"):
        data.verify(progress=False)
    with pytest.raises(DataError, match=r"data.jsonl, row 2: broken image"):
        open_quadruplets(source, verify=True, progress=False)


def test_a_failure_while_training_names_the_row_and_the_remedy(source: Path) -> None:
    data = open_quadruplets(source)
    with pytest.raises(DataError, match=r"data.jsonl, row 4: broken image .*safe3.png: .*run verify\(\)"):
        data[3]
    verified = open_quadruplets(source, on_error="skip", progress=False)
    (source.parent / "images" / "safe2.png").unlink()  # lost after the check
    with pytest.raises(DataError, match=r"data.jsonl, row 3: cannot read image .*safe2.png"):
        verified[1]


def test_the_outcome_is_cached_until_a_file_changes(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"
    decoded = []
    real = images.decode
    monkeypatch.setattr(images, "decode", lambda *args: decoded.append(args[1]) or real(*args))

    def opened() -> QuadrupletDataset:
        decoded.clear()
        return open_quadruplets(source, on_error="skip", cache_dir=cache, progress=False)

    first = opened()
    assert len(decoded) >= 6
    second = opened()
    assert decoded == []
    assert texts(second) == texts(first)
    assert second.content_hash() == first.content_hash()
    assert (second.summary.reasons, second.summary.problems) == (first.summary.reasons, first.summary.problems)
    (tmp_path / "images" / "safe3.png").write_bytes(image_bytes(6))  # repaired
    assert len(opened()) == 3 and decoded
    for file in cache.iterdir():
        file.write_bytes(b"{torn")  # a damaged cache is not trusted
    assert len(opened()) == 3 and decoded


def test_a_failed_check_is_not_cached_as_a_success(source: Path, tmp_path: Path) -> None:
    for _ in range(2):
        with pytest.raises(DataError, match="row 2"):
            open_quadruplets(source, verify=True, cache_dir=tmp_path / "cache", progress=False)


def test_pixel_limit_counts_as_a_bad_image(source: Path) -> None:
    with pytest.raises(DataError, match=r"12 x 10 pixels, more than max_pixels=119"):
        open_quadruplets(source, max_pixels=119)[0]


def test_verifying_twice_counts_once(source: Path) -> None:
    data = open_quadruplets(source, on_error="skip", verify=False)
    assert data.summary.skipped == 0
    for _ in range(2):
        assert data.verify(progress=False).summary.skipped == 2
    assert data.verify(progress=False).verify(progress=False).summary.skipped == 2


def test_content_hash_depends_on_content_alone(tmp_path: Path, rows: list[dict]) -> None:
    first = write_rows(tmp_path / "a.jsonl", rows)
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    (tmp_path / "images").rename(moved / "pictures")
    for row in rows:
        for side in ("safe_image", "unsafe_image"):
            row[side] = row[side].replace("images", "pictures")
    second = write_rows(moved / "b.jsonl", rows)
    (tmp_path / "images").symlink_to(moved / "pictures")
    assert open_quadruplets(first).content_hash() == open_quadruplets(second).content_hash()
    assert open_quadruplets(second).verify(progress=False).content_hash() == open_quadruplets(second).content_hash()
    base = open_quadruplets(second).content_hash()
    rows[1]["unsafe_text_label"] = 0
    assert open_quadruplets(write_rows(second, rows)).content_hash() != base
    rows[1]["unsafe_text_label"] = 1
    assert open_quadruplets(write_rows(second, rows[::-1])).content_hash() != base
    os.utime(second)
    (moved / "pictures" / "safe0.png").write_bytes(image_bytes(99))
    assert open_quadruplets(write_rows(second, rows)).content_hash() != base


def test_records_of_ones_own(rows: list[dict], tmp_path: Path) -> None:
    image = images.ImageFile(str(tmp_path / rows[0]["safe_image"]))
    data = QuadrupletDataset([Quadruplet(image, "a star", image, "a star on fire")], transform=lambda image: image.size)
    assert data[0]["safe_image"] == (12, 10) and data.summary.read == 1
    other = Quadruplet(image, "a", image, "bc")
    glued = Quadruplet(image, "ab", image, "c")
    assert other.digest() != glued.digest()  # the boundary between the texts counts
    with pytest.raises(DataError, match="no usable quadruplet in records"):
        QuadrupletDataset([])
