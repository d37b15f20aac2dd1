"""Decoded images: the same items bit for bit, made once, and never those of other data or of a damaged file."""

import os
import pickle
import warnings
from pathlib import Path

import pytest
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from torch.utils.data import DataLoader
from torchvision import transforms

from saferclip_fast.data import DataError, ToTensor, decode_images, images, open_quadruplets
from saferclip_fast.storage import row_cache
from saferclip_fast.storage.row_file import RowFile
from tests.support.quadruplet_files import image_bytes, write_rows

PREPROCESS = image_transform_v2(PreprocessCfg(size=16), is_train=False)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Seven quadruplets whose 14 images differ in size and format, one file used twice."""
    (tmp_path / "images").mkdir()
    rows = []
    for i in range(7):
        for side, fmt in (("safe", "PNG"), ("unsafe", "JPEG")):
            size = (12 + 5 * i, 40 - 3 * i)
            (tmp_path / f"images/{side}{i}").write_bytes(image_bytes(2 * i + (side == "unsafe"), size, fmt))
        rows.append(
            {
                "safe_image": f"images/safe{i if i < 6 else 0}",
                "unsafe_image": f"images/unsafe{i}",
                "safe_text": f"number {i}",
                "unsafe_text": f"number {i} on fire",
            }
        )
    return write_rows(tmp_path / "data.jsonl", rows)


def opened(source, transform=PREPROCESS):
    return open_quadruplets(source, transform=transform)


def cached(source, cache, transform=PREPROCESS, **options):
    return decode_images(opened(source, transform), cache, progress=False, **options)


def the_file(cache: Path) -> Path:
    (path,) = cache.glob("decoded-*.safetensors")
    return path


def assert_same_items(found, expected):
    assert len(found) == len(expected)
    for i in range(len(expected)):
        a, b = found[i], expected[i]
        assert a.keys() == b.keys()
        for name, value in b.items():
            same = torch.equal(a[name], value) if isinstance(value, torch.Tensor) else a[name] == value
            assert same, (i, name)


@pytest.mark.parametrize("resize_mode", ["shortest", "longest", "squash"])
def test_items_are_the_same_bit_for_bit(source, tmp_path, resize_mode):
    cfg = PreprocessCfg(size=16, resize_mode=resize_mode)
    transform = image_transform_v2(cfg, is_train=False)
    found = cached(source, tmp_path / "cache", transform)
    assert found[0]["safe_image"].dtype == torch.float32 and found[0]["safe_image"].shape == (3, 16, 16)
    assert_same_items(found, opened(source, transform))
    assert found.content_hash() == opened(source).content_hash()
    assert [r.file for r in found.records] == [r.file for r in opened(source).records]


def test_scenes_without_resizing(tmp_path):
    for transform in (ToTensor((0.4, 0.5, 0.6), (0.2, 0.3, 0.2)), PREPROCESS):
        scenes = open_quadruplets("scenes:n=9,size=16,mixed=0.5", transform=transform)
        assert_same_items(decode_images(scenes, tmp_path, progress=False), scenes)


def test_images_are_decoded_once_and_then_mapped(source, tmp_path, monkeypatch):
    expected, cache = [opened(source)[i] for i in range(7)], tmp_path / "cache"
    cached(source, cache, num_workers=2)
    asked = []
    decode = images.decode
    monkeypatch.setattr(images, "decode", lambda *args: asked.append(args) or decode(*args))
    found = cached(source, cache)
    assert len(asked) <= 8, "the probe of four samples alone"
    asked.clear()
    assert all(torch.equal(found[i]["unsafe_image"], expected[i]["unsafe_image"]) for i in range(7))
    assert not asked
    assert str(the_file(cache)) in Path("/proc/self/maps").read_text()


def test_loader_processes_share_the_file(source, tmp_path):
    found, expected = cached(source, tmp_path / "cache"), opened(source)
    assert len(pickle.dumps(found)) < 100_000, "a process that is not forked maps the file itself"
    loader = DataLoader(found, None, num_workers=1, multiprocessing_context="spawn")
    for item, wanted in zip(loader, (expected[i] for i in range(7)), strict=True):
        assert torch.equal(item["safe_image"], wanted["safe_image"])


def test_killed_run_goes_on(source, tmp_path, monkeypatch):
    cache, dataset = tmp_path / "cache", opened(source)
    monkeypatch.setattr("saferclip_fast.data.decoded._BATCH", 2)
    monkeypatch.setattr(row_cache, "_SYNC_BYTES", 4 * (2 * 16 * 16 * 3 + 16))  # four rows
    write, first_rows = RowFile.write, []

    def dies(self, name, first, rows):
        first_rows.append(first)
        if first == 6:
            raise KeyboardInterrupt
        return write(self, name, first, rows)

    monkeypatch.setattr(RowFile, "write", dies)
    with pytest.raises(KeyboardInterrupt):
        decode_images(dataset, cache, progress=False)
    assert not list(cache.glob("*.safetensors")), "a partial file does not pass for a whole one"
    first_rows.clear()
    monkeypatch.setattr(RowFile, "write", lambda *args: first_rows.append(args[2]) or write(*args))
    assert_same_items(decode_images(dataset, cache, progress=False), dataset)
    assert set(first_rows) == {4, 6}, "the four rows on disk are not decoded again"
    assert not list(cache.glob("*.partial")) and not list(cache.glob("*.progress*"))


def test_a_truncated_file_is_refused(source, tmp_path):
    cached(source, tmp_path / "cache")
    path = the_file(tmp_path / "cache")
    os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(ValueError, match=r"decoded-\w+.safetensors is damaged \(.*\); delete it to make it again"):
        cached(source, tmp_path / "cache")
    path.unlink()
    assert_same_items(cached(source, tmp_path / "cache"), opened(source))


def test_a_flipped_bit_is_found_where_it_matters(source, tmp_path):
    cached(source, tmp_path / "cache")
    path = the_file(tmp_path / "cache")
    content = bytearray(path.read_bytes())
    content[-5] ^= 4  # the last unsafe image
    path.write_bytes(content)
    found = cached(source, tmp_path / "cache")
    assert found[5]["unsafe_image"].shape == (3, 16, 16)
    with pytest.raises(DataError, match=r"decoded-\w+.safetensors is damaged: unsafe_image 6 is not as it was written"):
        found[6]


def test_a_file_of_other_data_is_refused(source, tmp_path):
    cached(source, tmp_path / "cache")
    path = the_file(tmp_path / "cache")
    (tmp_path / "images" / "safe1").write_bytes(image_bytes(99))
    cached(source, tmp_path / "cache")
    (other,) = set(tmp_path.glob("cache/decoded-*.safetensors")) - {path}
    path.replace(other)
    with pytest.raises(ValueError, match=r"was made with data_hash='\w+', but data_hash='\w+' is in use; delete"):
        cached(source, tmp_path / "cache")


def test_another_size_or_decoder_gets_a_file_of_its_own(source, tmp_path, monkeypatch):
    cached(source, tmp_path / "cache")
    transform = image_transform_v2(PreprocessCfg(size=18), is_train=False)
    assert_same_items(cached(source, tmp_path / "cache", transform), opened(source, transform))
    decode = images.decode

    def brighter(*args):
        return decode(*args).point(lambda value: value // 2)

    monkeypatch.setattr(images, "decode", brighter)
    assert_same_items(cached(source, tmp_path / "cache"), opened(source))
    assert len(list(tmp_path.glob("cache/decoded-*.safetensors"))) == 3


def test_a_full_disk_leaves_nothing(source, tmp_path, monkeypatch):
    def full(descriptor, offset, length):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match=r"no room for 0\.00 GB in .* \(No space left on device\)"):
        cached(source, tmp_path / "cache")
    assert not [p for p in (tmp_path / "cache").iterdir() if p.suffix != ".lock"]


@pytest.mark.parametrize(
    "transform",
    [
        lambda image: torch.zeros(3, 4, 4),
        image_transform_v2(PreprocessCfg(size=16), is_train=True),
    ],
)
def test_unsuitable_transforms_are_refused(source, tmp_path, transform):
    with pytest.raises(
        ValueError, match=r"(?s)needs a transform that resizes and crops, without chance, .*use data.dec"
    ):
        cached(source, tmp_path, transform)


def test_images_that_differ_in_size_are_refused(source, tmp_path, monkeypatch):
    transform = transforms.Compose([transforms.Resize(16), transforms.ToTensor()])  # nothing cropped
    with pytest.raises(ValueError, match=r"images differ in size after resizing"):
        cached(source, tmp_path, transform)
    monkeypatch.setattr("saferclip_fast.data.decoded._BATCH", 1)
    with pytest.raises(ValueError, match=r"rows of safe_image are \[\d+, \d+, 3\], but row \d is \[\d+, \d+, 3\]"):
        cached(source, tmp_path, transform)


def test_a_broken_image_is_named(source, tmp_path):
    (tmp_path / "images" / "unsafe3").write_bytes(b"not an image")
    with pytest.raises(DataError, match=r"data.jsonl, row 4: broken image .*unsafe3"), warnings.catch_warnings():
        cached(source, tmp_path / "cache")
