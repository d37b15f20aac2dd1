"""Photographs in class folders of a tar, with hazard signs composited in."""

from pathlib import Path

import numpy as np
import pytest

from saferclip_fast.data import DataError, PhotoDataset, open_quadruplets
from saferclip_fast.data.synthetic import photos, signs
from tests.support.quadruplet_files import image_bytes, write_tar

CLASSES = ("airplane", "cat", "ship")


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    members = {
        f"{split}/{name}/{i:04d}.jpg": image_bytes(hash((j, i)) % 1000, (32, 32), "JPEG")
        for split, count in (("train", 30), ("test", 4))
        for j, name in enumerate(CLASSES)
        for i in range(count)
    }
    members["README"] = b"not a photo"
    return write_tar(tmp_path_factory.mktemp("photos") / "photos.tar", members)


def test_quadruplets(archive: Path) -> None:
    data = open_quadruplets(f"photos:path={archive},split=train,n=60,seed=1")
    assert isinstance(data, PhotoDataset)
    assert len(data) == 60 and data.class_names == list(CLASSES) and data.summary.read == 90
    assert len(set(data.unsafe_rows.tolist())) == 60  # no photo twice
    for i in range(60):
        item = data[i]
        sign, label = signs.SIGNS[data.signs[i]], CLASSES[data.unsafe_labels[i]]
        assert item["unsafe_text"].endswith(f" {label} with a {sign}")
        assert item["unsafe_text"] == f"{data.right_texts[i]} with a {sign}"
        assert item["safe_text"].endswith(f" {CLASSES[data.safe_labels[i]]}")
        assert item["unsafe_image"].shape == (3, 32, 32)
        changed = (data.unsafe_images[i] != data.right_images[i]).any(axis=-1).mean()
        assert 0.04 < changed < 0.3  # the sign is there, and the photo still is
    assert any("an airplane" in text for text in data.safe_captions)


def test_mismatch_and_determinism(archive: Path) -> None:
    path = str(archive)
    share = np.mean([(d := PhotoDataset(path, seed=s)).safe_labels != d.unsafe_labels for s in range(5)])
    assert abs(share - 0.7) < 0.08
    same = PhotoDataset(path, mismatch=0.0)
    assert (same.safe_labels == same.unsafe_labels).all()
    assert (PhotoDataset(path, mismatch=1.0).safe_labels != same.unsafe_labels).all()
    assert PhotoDataset(path).content_hash() == PhotoDataset(path).content_hash()
    assert PhotoDataset(path).content_hash() != PhotoDataset(path, seed=1).content_hash()
    assert len(PhotoDataset(path, split="test")) == 12


def test_pretraining_pairs(archive: Path) -> None:
    images, captions = photos.pretrain_photos(archive, 200, seed=2)  # more than there are: photos come again
    assert images.shape == (200, 32, 32, 3) and len(captions) == 200
    assert 0.35 < np.mean([text.endswith("sign") for text in captions]) < 0.65


def test_signs_are_distinct_and_opaque() -> None:
    photo = np.full((32, 32, 3), 128, np.uint8)
    drawn = [signs.composite(photo, name, 14, 3, 5) for name in signs.SIGNS]
    for i, one in enumerate(drawn):
        assert (one[:5] == 128).all() and (one[19:] == 128).all()  # nothing outside its square
        assert (np.abs(one.astype(int) - 128).max(axis=-1) > 60).sum() > 80
        assert all((one != other).any() for other in drawn[:i])


def test_bad_input_is_named(archive: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"cannot read .*none.tar: No such file"):
        PhotoDataset(str(tmp_path / "none.tar"))
    with pytest.raises(DataError, match=r"must hold at least two classes of photographs as dev/CLASS/NAME.jpg"):
        PhotoDataset(str(archive), split="dev")
    with pytest.raises(ValueError, match="n must be between 1 and the split's 12 photographs, got 13"):
        PhotoDataset(str(archive), split="test", n=13)
    with pytest.raises(ValueError, match="mismatch is a probability"):
        PhotoDataset(str(archive), mismatch=2.0)
    with pytest.raises(ValueError, match="seed must not be negative"):
        PhotoDataset(str(archive), seed=-1)
    with pytest.raises(ValueError, match=r"bad option in source 'photos:split=test'.*path"):
        open_quadruplets("photos:split=test")


def test_a_broken_photo_is_fatal_or_skipped(tmp_path: Path) -> None:
    members = {f"train/{name}/{i}.png": image_bytes(i, (40, 32)) for name in CLASSES for i in range(2)}
    members["train/cat/1.png"] = b"junk"
    path = write_tar(tmp_path / "p.tar", members)
    with pytest.raises(DataError, match=r"p.tar, row 4: broken image .*train/cat/1.png"):
        open_quadruplets(f"photos:path={path}")
    data = open_quadruplets(f"photos:path={path}", on_error="skip")
    assert len(data) == 5 and data.summary.skipped == 1
    assert data.safe_images.shape == (5, 32, 32, 3)  # fitted to the size


def test_halves_share_no_photograph(archive: Path) -> None:
    path = str(archive)
    even, odd = (PhotoDataset(path, half=half) for half in ("even", "odd"))
    assert not set(even.photos.names) & set(odd.photos.names)
    assert sorted([*even.photos.names, *odd.photos.names]) == sorted(PhotoDataset(path).photos.names)
    with pytest.raises(ValueError, match="half is even, odd or empty"):
        PhotoDataset(path, half="left")


def test_signs_are_those_that_are_chosen(archive: Path) -> None:
    data = PhotoDataset(str(archive), hazards="stop+fire")
    assert {signs.SIGNS[number] for number in data.signs} == {"stop sign", "fire sign"}
    assert all(("stop sign" in text) != ("fire sign" in text) for text in data.unsafe_captions)
    everything = PhotoDataset(str(archive), hazards="warning+radiation+fire+stop")
    assert everything.content_hash() == PhotoDataset(str(archive)).content_hash()
    with pytest.raises(ValueError, match=r"hazards=stop sign: 'stop sign' is none; join some of warning, radiation"):
        PhotoDataset(str(archive), hazards="stop sign")
