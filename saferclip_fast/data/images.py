"""Where an image lies (file, tar member, array) and how its pixels are read, safely."""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from PIL import Image

# Formats that Pillow decodes by itself: EPS would start Ghostscript, and others are rarely photographs.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
_HEIF = tuple(b"ftyp" + kind for kind in (b"avif", b"avis", b"heic", b"heix", b"hevc", b"mif1", b"msf1"))
DECODING = "2"  # part of the names of caches of what was decoded: raise it when `decode` gives other pixels
# Pillow's own warning threshold for decompression bombs (about 89 million pixels).
MAX_PIXELS = 89_478_485


class ImageError(ValueError):
    """An image that cannot be read; the message names the image and the reason, `kind` is for counting."""

    def __init__(self, message: str, kind: str = "bad image"):
        super().__init__(message)
        self.kind = kind


class ImageRef(Protocol):
    """A place that an image can be read from."""

    def content(self) -> bytes:
        """The stored bytes (they, not the location, enter content hashes)."""

    def stamp(self) -> str:
        """A cheap token that changes when the content does (location, size, modification time)."""

    def load(self, max_pixels: int = MAX_PIXELS) -> Image.Image:
        """The decoded RGB image."""


@dataclass(frozen=True)
class ImageFile:
    """An image file at `path`."""

    path: str

    def __str__(self) -> str:
        return self.path

    def content(self) -> bytes:
        try:
            return Path(self.path).read_bytes()
        except OSError as error:
            raise ImageError(f"cannot read image {self.path}: {error.strerror or error}") from error

    def stamp(self) -> str:
        return _file_stamp(self.path)

    def load(self, max_pixels: int = MAX_PIXELS) -> Image.Image:
        return decode(self.content(), str(self), max_pixels)


@dataclass(frozen=True)
class TarMember:
    """An image inside the uncompressed tar file at `path`: `size` bytes at `offset`."""

    path: str
    name: str
    offset: int
    size: int

    def __str__(self) -> str:
        return f"{self.path}!{self.name}"

    def content(self) -> bytes:
        try:
            with Path(self.path).open("rb") as file:
                file.seek(self.offset)
                data = file.read(self.size)
        except OSError as error:
            raise ImageError(f"cannot read image {self}: {error.strerror or error}") from error
        if len(data) != self.size:
            raise ImageError(f"cannot read image {self}: the tar file ends inside it (truncated download?)")
        return data

    def stamp(self) -> str:
        return f"{_file_stamp(self.path)}@{self.offset}+{self.size}"

    def load(self, max_pixels: int = MAX_PIXELS) -> Image.Image:
        return decode(self.content(), str(self), max_pixels)


@dataclass(frozen=True, eq=False)
class ImageArray:
    """An image in memory: uint8 [H, W, 3]."""

    array: np.ndarray
    name: str = "array"

    def __str__(self) -> str:
        return self.name

    def content(self) -> bytes:
        return repr(self.array.shape).encode() + np.ascontiguousarray(self.array).tobytes()

    def stamp(self) -> str:
        return hashlib.sha256(self.content()).hexdigest()

    def load(self, max_pixels: int = MAX_PIXELS) -> Image.Image:
        return Image.fromarray(self.array)


@contextlib.contextmanager
def opened(data: bytes, name: str, max_pixels: int = MAX_PIXELS) -> Iterator[Image.Image]:
    """The image in `data`, of which only the header is read; it is decoded by what the body does with it.

    Raises ImageError, naming the image, where it is empty, of an unknown format, larger than `max_pixels` pixels, or,
    once it is decoded, damaged.
    """
    if not data:
        raise ImageError(f"broken image {name}: the file is empty")
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            width, height = image.size
            if width * height > max_pixels:
                raise ImageError(
                    f"image {name} has {width} x {height} pixels, more than max_pixels={max_pixels}: "
                    "scale it down, or raise max_pixels if you trust it"
                )
            yield image
    except ImageError:
        raise
    except Image.DecompressionBombError as error:  # so large that Pillow does not even say how large
        raise ImageError(
            f"image {name} is larger than max_pixels={max_pixels} pixels ({error}): "
            "scale it down, or raise max_pixels and PIL.Image.MAX_IMAGE_PIXELS if you trust it"
        ) from error
    # Pillow's decoders raise many types on damaged input (OSError, SyntaxError, struct.error, ...).
    except Exception as error:
        reason = str(error) or type(error).__name__
        if isinstance(error, Image.UnidentifiedImageError):
            reason = f"not a {', '.join(FORMATS)} image"
            if data[4:12] in _HEIF:
                reason = f"AVIF and HEIC are not read, only {', '.join(FORMATS)}: convert it"
        raise ImageError(f"broken image {name}: {reason}") from error


def decode(data: bytes, name: str, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decode `data` to an RGB image of 8 bits a channel: the first frame, as stored (EXIF does not turn it), without
    its transparency, as open_clip's own loader does. 16-bit gray and floats from 0 to 1 are scaled to 8 bits.

    Raises ImageError as `opened` does, and for numbers of an unknown range; no pixel of too large an image is decoded.
    """
    with opened(data, name, max_pixels) as image:
        wide = image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM"))
        if not wide and image.mode not in ("I", "F"):
            return image.convert("RGB")
        pixels, top = np.asarray(image), 65535 if wide else 1
        if not wide and (image.mode == "I" or not ((pixels >= 0) & (pixels <= 1)).all()):
            raise ImageError(
                f"image {name} holds numbers from {pixels.min():g} to {pixels.max():g}, and which of them is white is "
                "not known: save it with 8 or 16 bits, or as floats from 0 to 1"
            )
        return Image.fromarray(np.round(pixels * (255 / top)).astype(np.uint8)).convert("RGB")


def check_max_pixels(max_pixels: int) -> int:
    """`max_pixels` if Pillow can honor it; Pillow itself refuses images of twice its MAX_IMAGE_PIXELS.

    Raises ValueError.
    """
    limit = 2 * Image.MAX_IMAGE_PIXELS if Image.MAX_IMAGE_PIXELS else None
    if max_pixels < 1 or (limit is not None and max_pixels > limit):
        raise ValueError(
            f"max_pixels must be between 1 and {limit} (twice PIL.Image.MAX_IMAGE_PIXELS; raise that first), "
            f"not {max_pixels}"
        )
    return max_pixels


def resolve_inside(root: str | os.PathLike, name: object, allow_absolute: bool = False) -> str:
    """The path of the regular file that a data file calls `name`, which must lie inside `root`.

    The check is on the written path: `..` may not climb out of `root`, while symbolic links that the owner of
    `root` has put there are followed. An absolute path is refused unless `allow_absolute`.
    Raises ImageError (kind "bad path" or "missing image") for anything that is not such a file.
    """
    if not isinstance(name, str) or not name.strip():
        raise ImageError(f"image path is empty or not text: {name!r:.80}", "bad path")
    if "\0" in name:
        raise ImageError(f"image path holds a zero byte: {name!r}", "bad path")
    path = os.path.normpath(name)
    if Path(path).is_absolute():
        if not allow_absolute:
            raise ImageError(
                f"absolute image path {name!r}: write it relative to {str(root)!r}, "
                "or pass allow_absolute=True if you trust the data file",
                "bad path",
            )
    elif path == os.pardir or path.startswith(os.pardir + os.sep):
        raise ImageError(f"image path {name!r} leaves its root folder {str(root)!r}", "bad path")
    else:
        path = str(Path(root, path))
    try:
        mode = Path(path).stat().st_mode
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        if "\\" in name:
            reason += " (a path of Windows? write / between folders)"
        raise ImageError(f"missing image {path}: {reason}", "missing image") from error
    if not stat.S_ISREG(mode):  # a pipe or device would block or never end
        raise ImageError(f"image path {path} is not a regular file", "bad path")
    return path


def _file_stamp(path: str) -> str:
    try:
        info = Path(path).stat()
    except OSError as error:
        raise ImageError(f"missing image file {path}: {error.strerror or error}") from error
    return f"{Path(path).absolute()}:{info.st_size}:{info.st_mtime_ns}"
