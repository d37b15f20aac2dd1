"""Images: what is decoded, and what is refused with which message."""

import io
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from saferclip_fast.data import ImageError, ImageFile, TarMember, ToTensor
from saferclip_fast.data.images import check_max_pixels, decode, resolve_inside
from tests.support.quadruplet_files import image_bytes


def png_claiming(width: int, height: int) -> bytes:
    """A few bytes that claim to be a huge picture."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 99)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "LA", "CMYK", "1"])
def test_every_color_mode_becomes_rgb(mode: str) -> None:
    buffer = io.BytesIO()
    Image.new(mode, (5, 4)).save(buffer, "TIFF" if mode == "CMYK" else "PNG")
    assert decode(buffer.getvalue(), "x").mode == "RGB"


RAMP = np.arange(4096).reshape(64, 64)


@pytest.mark.parametrize(
    ("pixels", "fmt"),
    [
        ((RAMP * 16).astype("uint16"), "PNG"),
        ((RAMP * 16).astype("uint16"), "TIFF"),
        ((RAMP * 16).astype(">u2"), "TIFF"),
        ((RAMP * 16).astype("uint16"), "PPM"),
        ((RAMP / 4096).astype("float32"), "TIFF"),
    ],
)
def test_wide_pixels_are_scaled_to_8_bits(pixels: np.ndarray, fmt: str) -> None:
    """The same ramp in 16 bits and in floats: 0 is black, 65535 and 1 are white."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, fmt)
    found = np.asarray(decode(buffer.getvalue(), "x")).astype(int)
    assert np.abs(found - (RAMP * 255 / 4096)[..., None]).max() <= 1 and found.shape == (64, 64, 3)
    assert abs(found.mean() - 127) < 1


@pytest.mark.parametrize(
    ("pixels", "message"),
    [
        (RAMP.astype("int32"), "image x holds numbers from 0 to 4095, and which of them is white is not known"),
        ((RAMP / 16).astype("float32"), "image x holds numbers from 0 to 255.938"),
        (np.full((4, 4), np.nan, "float32"), "image x holds numbers from nan"),
    ],
)
def test_numbers_of_an_unknown_range_are_refused(pixels: np.ndarray, message: str) -> None:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "TIFF")
    with pytest.raises(ImageError, match=message):
        decode(buffer.getvalue(), "x")


def test_orientation_and_transparency_are_left_as_open_clip_leaves_them() -> None:
    image = Image.fromarray(np.full((4, 6, 4), (200, 100, 50, 0), dtype=np.uint8))
    buffer = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    image.save(buffer, "PNG", exif=exif)
    found = decode(buffer.getvalue(), "x")
    assert found.size == (6, 4) and found.getpixel((0, 0)) == (200, 100, 50)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"\0\0\0\x1cftypavif" + b"\0" * 99, "broken image x: AVIF and HEIC are not read.*convert it"),
        (b"\0\0\0\x1cftypheic" + b"\0" * 99, "broken image x: AVIF and HEIC are not read"),
        (b"", "broken image x: the file is empty"),
        (b"not an image", "broken image x: not a JPEG, PNG"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "broken image x: not a JPEG, PNG"),
        (image_bytes(0, (64, 64), "JPEG")[:700], "broken image x: .*truncated"),
        (image_bytes(0, (64, 64), "PNG")[:700], "broken image x: "),
        (png_claiming(40_000, 40_000), "image x is larger than max_pixels=89478485 pixels"),
    ],
)
def test_broken_images_are_named(data: bytes, message: str) -> None:
    with pytest.raises(ImageError, match=message):
        decode(data, "x")


def test_pixel_limit_is_checked_before_decoding() -> None:
    data = image_bytes(0, (20, 10))
    assert decode(data, "x", max_pixels=200).size == (20, 10)
    with pytest.raises(ImageError, match=r"image x has 20 x 10 pixels, more than max_pixels=199"):
        decode(data, "x", max_pixels=199)
    with pytest.raises(ValueError, match="raise that first"):
        check_max_pixels(10**12)


def test_paths_stay_inside_their_root(tmp_path: Path) -> None:
    root = tmp_path / "root"
    (root / "a").mkdir(parents=True)
    (root / "a" / "x.png").write_bytes(b"x")
    (tmp_path / "secret.png").write_bytes(b"x")
    assert resolve_inside(root, "a/x.png") == str(root / "a" / "x.png")
    assert resolve_inside(root, "a/../a/x.png") == str(root / "a" / "x.png")
    for name in ("../secret.png", "a/../../secret.png", ".."):
        with pytest.raises(ImageError, match="leaves its root folder") as caught:
            resolve_inside(root, name)
        assert caught.value.kind == "bad path"
    absolute = str(tmp_path / "secret.png")
    with pytest.raises(ImageError, match="pass allow_absolute=True"):
        resolve_inside(root, absolute)
    assert resolve_inside(root, absolute, allow_absolute=True) == absolute


def test_a_link_made_by_the_owner_of_the_root_is_followed(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk" / "x.png").write_bytes(b"x")
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "coco").symlink_to(tmp_path / "disk")
    assert Path(resolve_inside(tmp_path / "root", "coco/x.png")).read_bytes() == b"x"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("", "empty or not text"),
        (None, "empty or not text"),
        (7, "empty or not text"),
        ("a\0b", "zero byte"),
        ("none.png", "missing image .*none.png: No such file"),
        (".", "not a regular file"),
        ("pipe", "not a regular file"),
        ("x" * 5000, "missing image"),
    ],
)
def test_unusable_paths_are_named(tmp_path: Path, name: object, message: str) -> None:
    os.mkfifo(tmp_path / "pipe")  # opening it would block for ever
    with pytest.raises(ImageError, match=message):
        resolve_inside(tmp_path, name)


def test_references_report_what_they_cannot_read(tmp_path: Path) -> None:
    path = tmp_path / "t.tar"
    path.write_bytes(b"123456")
    assert TarMember(str(path), "m", 2, 3).content() == b"345"
    with pytest.raises(ImageError, match=r"t.tar!m: the tar file ends inside it"):
        TarMember(str(path), "m", 2, 30).content()
    for reference in (ImageFile(str(tmp_path / "no")), TarMember(str(tmp_path / "no"), "m", 0, 1)):
        with pytest.raises(ImageError, match=r"cannot read image .*No such file"):
            reference.content()
        with pytest.raises(ImageError, match=r"missing image file"):
            reference.stamp()


def test_to_tensor_normalizes_each_channel() -> None:
    pixels = np.arange(24, dtype=np.uint8).reshape(2, 4, 3) * 10
    transform = ToTensor(mean=(0.5, 0.25, 0.0), std=(0.5, 1.0, 2.0))
    out = transform(Image.fromarray(pixels))
    expected = (pixels / 255.0 - [0.5, 0.25, 0.0]) / [0.5, 1.0, 2.0]
    torch.testing.assert_close(out, torch.from_numpy(expected).permute(2, 0, 1).float())
    assert repr(transform) == repr(ToTensor(mean=(0.5, 0.25, 0.0), std=(0.5, 1.0, 2.0))) != repr(ToTensor())
