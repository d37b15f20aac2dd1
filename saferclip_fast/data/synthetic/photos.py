"""Quadruplets from a tar of photographs in class folders (CIFAR-10 style: SPLIT/CLASS/NAME.jpg).

The archive is read where it lies. Captions come from templates; the unsafe version of a photograph has a
hazard sign composited in and named in its caption. The fixed safe partner is another photograph of the same
class, or, with probability `mismatch`, one of another class. Everything follows from the seed.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
from PIL import Image, ImageOps

from ..errors import DataError, ErrorPolicy
from ..images import ImageArray, ImageError
from ..quadruplets import LazyRecords, Quadruplet, QuadrupletDataset
from ..readers.tar_index import index_tar
from ..transforms import Transform
from . import signs
from .names import chosen_names

# Caption templates and zero-shot prompts; {} takes a class name with its article.
TEMPLATES = ("a photo of {}", "a picture of {}", "a small photo of {}", "an image of {}")
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
HAZARDS = tuple(name.removesuffix(" sign") for name in signs.SIGNS)


@dataclass
class Photos:
    """All photographs of one split: images uint8 [N, size, size, 3], labels int64 [N] into class_names."""

    images: np.ndarray
    labels: np.ndarray
    class_names: list[str]
    names: list[str] = field(default_factory=list)
    policy: ErrorPolicy | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def every_second(self, start: int) -> Photos:
        """The photographs start, start + 2, ..."""
        kept = slice(start, None, 2)
        return replace(self, images=self.images[kept], labels=self.labels[kept], names=self.names[kept])


def load_photos(path: str | os.PathLike, split: str, size: int = 32, on_error: str = "raise") -> Photos:
    """Decode SPLIT/CLASS/NAME.jpg members of the tar at `path`, fitted to size x size.

    Raises DataError for an unreadable tar, a split that it lacks, or (unless on_error is "skip") a broken
    photo.
    """
    policy = ErrorPolicy(on_error, f"{path} {split}/")
    images, classes, names = [], [], []
    for member in index_tar(path):
        parts = member.name.removeprefix("./").split("/")
        if len(parts) != 3 or parts[0] != split or not parts[2].lower().endswith(SUFFIXES):
            continue
        policy.summary.read += 1
        try:
            image = member.load()
        except ImageError as error:
            policy.bad("bad image", str(path), policy.summary.read, error)
            continue
        images.append(np.asarray(ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC)))
        classes.append(parts[1])
        names.append(member.name)
    class_names = sorted(set(classes))
    if len(class_names) < 2:
        raise DataError(f"{path} must hold at least two classes of photographs as {split}/CLASS/NAME.jpg")
    index = {name: label for label, name in enumerate(class_names)}
    labels = np.array([index[name] for name in classes], np.int64)
    return Photos(np.stack(images), labels, class_names, names, policy)


def with_article(name: str) -> str:
    """ "cat" -> "a cat", "airplane" -> "an airplane"."""
    return f"{'an' if name[0].lower() in 'aeiou' else 'a'} {name}"


def _captions(photos: Photos, rows: np.ndarray, template: np.ndarray, sign: np.ndarray) -> list[str]:
    """One caption a photo; sign -1 names none."""
    captions = []
    for row, chosen, drawn in zip(rows.tolist(), template.tolist(), sign.tolist(), strict=True):
        text = TEMPLATES[chosen].format(with_article(photos.class_names[photos.labels[row]]))
        captions.append(text if drawn < 0 else f"{text} with a {signs.SIGNS[drawn]}")
    return captions


def _composited(photos: Photos, rows: np.ndarray, sign: np.ndarray, layout: np.ndarray) -> np.ndarray:
    """uint8 copies of the photos with their signs (sign -1: none); layout [n, 3] in [0, 1): scale, x, y."""
    out = photos.images[rows]
    side = out.shape[1]
    sizes = (side * (0.35 + 0.15 * layout[:, 0])).astype(int)  # 11 to 15 of 32 pixels
    for index in np.flatnonzero(sign >= 0):
        room = side - sizes[index] + 1
        left, top = int(layout[index, 1] * room), int(layout[index, 2] * room)
        out[index] = signs.composite(out[index], signs.SIGNS[sign[index]], int(sizes[index]), left, top)
    return out


class PhotoDataset(QuadrupletDataset):
    """Quadruplets of photographs; serves items like any QuadrupletDataset.

    path: the tar. split: its top folder. n: number of quadruplets (default: one for each photo; at most that
    many). mismatch: probability that the fixed safe partner is of another class. size: pixels a side. half: "even" or
    "odd" takes every second photograph, so that two sets of one split share none. hazards: which signs
    unsafe photographs carry, as "fire+stop" (default: all of HAZARDS).

    Besides the items: uint8 [n, size, size, 3] arrays `safe_images`, `unsafe_images`, `right_images` (the
    unsafe photos without their sign), `right_texts`; int64 [n] `safe_labels`, `unsafe_labels` into
    `class_names`, `signs` into signs.SIGNS.

    Raises DataError for a tar that cannot be used, ValueError for options out of range.
    """

    def __init__(
        self,
        path: str,
        split: str = "train",
        n: int | None = None,
        seed: int = 0,
        mismatch: float = 0.7,
        size: int = 32,
        on_error: str = "raise",
        transform: Transform | None = None,
        half: str = "",
        hazards: str = "",
    ):
        if half not in ("", "even", "odd"):
            raise ValueError(f"half is even, odd or empty, got {half!r}")
        chosen = np.array(chosen_names(hazards, HAZARDS))
        self.photos = photos = load_photos(path, split, size, on_error)
        if half:
            self.photos = photos = photos.every_second(half == "odd")
        n = len(photos) if n is None else n
        if not 1 <= n <= len(photos):
            raise ValueError(f"n must be between 1 and the split's {len(photos)} photographs, got {n}")
        if not 0 <= mismatch <= 1:
            raise ValueError(f"mismatch is a probability, got {mismatch}")
        generator = _generator(seed, 0)
        self.unsafe_rows = generator.permutation(len(photos))[:n]
        self.safe_rows = _partners(photos.labels, self.unsafe_rows, mismatch, generator)
        self.signs = chosen[generator.integers(0, len(chosen), n)]
        self._layout = generator.random((n, 3))
        self._templates = generator.integers(0, len(TEMPLATES), (2, n))
        self.class_names = photos.class_names
        self.safe_labels = photos.labels[self.safe_rows]
        self.unsafe_labels = photos.labels[self.unsafe_rows]
        super().__init__(LazyRecords(n, self._quadruplet), transform, photos.policy)

    @cached_property
    def safe_images(self) -> np.ndarray:
        return self.photos.images[self.safe_rows]

    @cached_property
    def right_images(self) -> np.ndarray:
        return self.photos.images[self.unsafe_rows]

    @cached_property
    def unsafe_images(self) -> np.ndarray:
        return _composited(self.photos, self.unsafe_rows, self.signs, self._layout)

    @cached_property
    def safe_captions(self) -> list[str]:
        return _captions(self.photos, self.safe_rows, self._templates[0], np.full(len(self.signs), -1))

    @cached_property
    def unsafe_captions(self) -> list[str]:
        return _captions(self.photos, self.unsafe_rows, self._templates[1], self.signs)

    @cached_property
    def right_texts(self) -> list[str]:
        return _captions(self.photos, self.unsafe_rows, self._templates[1], np.full(len(self.signs), -1))

    def _quadruplet(self, index: int) -> Quadruplet:
        names = self.photos.names
        return Quadruplet(
            safe_image=ImageArray(self.safe_images[index], names[self.safe_rows[index]]),
            safe_text=self.safe_captions[index],
            unsafe_image=ImageArray(self.unsafe_images[index], names[self.unsafe_rows[index]] + " with a sign"),
            unsafe_text=self.unsafe_captions[index],
            file=self.summary.source,
            row=index,
        )

    def verify(self, *args: object, **options: object) -> PhotoDataset:
        """All photographs were decoded on opening: returns this data set."""
        return self


def pretrain_photos(
    path: str | os.PathLike,
    n: int,
    seed: int = 0,
    size: int = 32,
    unsafe_share: float = 0.5,
    split: str = "train",
) -> tuple[np.ndarray, list[str]]:
    """n image-caption pairs (uint8 [n, size, size, 3], captions) to pre-train a small CLIP on, photos in
    turn.

    A share of `unsafe_share` carries a sign that the caption names, so that the frozen model knows hazards.
    """
    photos = load_photos(path, split, size)
    generator = _generator(seed, 1)
    rows = np.concatenate([generator.permutation(len(photos)) for _ in range(-(-n // len(photos)))])[:n]
    sign = np.where(generator.random(n) < unsafe_share, generator.integers(0, len(signs.SIGNS), n), -1)
    images = _composited(photos, rows, sign, generator.random((n, 3)))
    return images, _captions(photos, rows, generator.integers(0, len(TEMPLATES), n), sign)


def _partners(labels: np.ndarray, rows: np.ndarray, mismatch: float, generator: np.random.Generator) -> np.ndarray:
    """For each of `rows` another photo: of a different class with probability mismatch, else of the same."""
    by_class = [np.flatnonzero(labels == label) for label in range(labels.max() + 1)]
    own = labels[rows]
    other = (own + generator.integers(1, len(by_class), len(rows))) % len(by_class)
    chosen = np.where(generator.random(len(rows)) < mismatch, other, own)
    partners = [
        by_class[label][int(u * len(by_class[label]))]
        for label, u in zip(chosen, generator.random(len(rows)), strict=True)
    ]
    return np.array(partners, np.int64)


def _generator(seed: int, stream: int) -> np.random.Generator:
    if seed < 0:
        raise ValueError(f"seed must not be negative, got {seed}")
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, stream])))
