"""Synthetic scenes: rendered images, captions, and harmless "unsafe" versions that carry a visible hazard.

A scene is a shape with a color, texture and size at a place; its unsafe version shows a hazard (fire, spikes,
warning tape, ...) that its caption names. A quadruplet's fixed safe partner shares all attributes of the
unsafe scene with probability 1 - mismatch, and differs in one to three of them otherwise, as ViSU's generated
pairs do; other safe scenes of the set then match better. Everything follows from the seed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from ..errors import ErrorPolicy
from ..images import ImageArray
from ..quadruplets import LazyRecords, Quadruplet, QuadrupletDataset
from ..transforms import Transform
from . import scene_render
from .names import chosen_names

ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "shape": tuple(scene_render.SHAPES),
    "color": tuple(scene_render.COLOR_RGB),
    "texture": tuple(scene_render.TEXTURES),
    "place": tuple(scene_render.PLACES),
    "size": ("small", "large"),
}
SIZES = tuple(len(names) for names in ATTRIBUTES.values())
COMBINATIONS = int(np.prod(SIZES))  # 1,152 different safe scenes, before layout
HAZARDS = ("fire", "spikes", "tape", "puddle", "smoke", "lightning")
NO_HAZARD = -1

PLACE_PHRASES = {
    "grass": "on grass",
    "desert": "in the desert",
    "water": "on water",
    "snow": "in the snow",
    "night": "under a night sky",
    "bricks": "by a brick wall",
}
HAZARD_PHRASES = {
    "fire": "on fire",
    "spikes": "with sharp spikes",
    "tape": "behind hazard tape",
    "puddle": "in a toxic puddle",
    "smoke": "in black smoke",
    "lightning": "struck by lightning",
}
# Zero-shot prompts; {} takes a class name such as "star" or "red star".
PROMPTS = ("a {}", "a picture of a {}")
SPLITS = {"train": 0, "test": 1, "pretrain": 2}  # each draws from its own random stream


@dataclass(frozen=True)
class Scenes:
    """N scenes: codes int64 [N, 5] into ATTRIBUTES, hazard int64 [N] (-1: none), layout float32 [N, 4] in [0,
    1)."""

    codes: np.ndarray
    hazard: np.ndarray
    layout: np.ndarray

    def __len__(self) -> int:
        return len(self.codes)

    def __getitem__(self, rows: slice | np.ndarray) -> Scenes:
        return Scenes(self.codes[rows], self.hazard[rows], self.layout[rows])

    def without_hazard(self) -> Scenes:
        """The same scenes, made safe."""
        return Scenes(self.codes, np.full_like(self.hazard, NO_HAZARD), self.layout)

    def scene_ids(self) -> np.ndarray:
        """int64 [N], equal where two scenes share all attributes (hazard and layout apart)."""
        return np.ravel_multi_index(tuple(self.codes.T), SIZES)

    def render(self, size: int) -> np.ndarray:
        """uint8 [N, size, size, 3] images."""
        names = {
            name: np.array(values)[self.codes[:, column]] for column, (name, values) in enumerate(ATTRIBUTES.items())
        }
        names["hazard"] = np.array([*HAZARDS, ""])[self.hazard]
        return scene_render.render(names, self.layout, size)

    def captions(self, drop: np.ndarray | None = None) -> list[str]:
        """One caption a scene. `drop` bool [N, 5] leaves the texture, place or size out (shape and color
        stay)."""
        drop = np.zeros(self.codes.shape, bool) if drop is None else drop
        return [_caption(*row) for row in zip(self.codes.tolist(), self.hazard.tolist(), drop.tolist(), strict=True)]


def _caption(codes: Sequence[int], hazard: int, drop: Sequence[bool]) -> str:
    shape, color, texture, place, size = (values[code] for values, code in zip(ATTRIBUTES.values(), codes, strict=True))
    words = ["a"]
    if not drop[4]:
        words.append(size)
    words.append(color)
    if not drop[2] and texture != "plain":
        words.append(texture)
    words.append(shape)
    if hazard != NO_HAZARD:
        words.append(HAZARD_PHRASES[HAZARDS[hazard]])
    if not drop[3]:
        words.append(PLACE_PHRASES[place])
    return " ".join(words)


def sample_scenes(n: int, generator: np.random.Generator, hazards: Sequence[int] = (), unique: bool = False) -> Scenes:
    """Draw n scenes uniformly, each with one of `hazards`; `unique`: no two share all attributes (n at most
    COMBINATIONS)."""
    if unique:
        if n > COMBINATIONS:
            raise ValueError(f"only {COMBINATIONS} scenes differ in their attributes, {n} asked for")
        ids = generator.permutation(COMBINATIONS)[:n]
        codes = np.stack(np.unravel_index(ids, SIZES), axis=1).astype(np.int64)
    else:
        codes = generator.integers(0, SIZES, size=(n, len(SIZES)))
    hazard = np.array(hazards)[generator.integers(0, len(hazards), n)] if hazards else np.full(n, NO_HAZARD, np.int64)
    return Scenes(codes, hazard, generator.random((n, 4), np.float32))


def change_attributes(scenes: Scenes, probability: float, generator: np.random.Generator) -> Scenes:
    """With `probability` a scene, change one to three of its attributes to other values; layouts are drawn
    anew."""
    n = len(scenes)
    changes = np.where(generator.random(n) < probability, generator.integers(1, 4, n), 0)
    rank = generator.permuted(np.tile(np.arange(len(SIZES)), (n, 1)), axis=1)  # which attributes go first
    shift = generator.integers(1, np.broadcast_to(SIZES, rank.shape))  # never 0 mod the number of values
    codes = np.where(rank < changes[:, None], (scenes.codes + shift) % SIZES, scenes.codes)
    return Scenes(codes, scenes.hazard, generator.random((n, 4), np.float32))


class SceneDataset(QuadrupletDataset):
    """Quadruplets of synthetic scenes; serves items like any QuadrupletDataset.

    n: number of quadruplets. seed, split: which stream of scenes ("train", "test", "pretrain"). size: pixels
    a side. mismatch: probability that the fixed safe partner differs from the unsafe scene in one to three
    attributes. mixed: probability that the unsafe side is mixed: its text names no hazard (unsafe_text_label
    0) or its image shows none (unsafe_image_label 0), half of them each. unique: no two unsafe scenes share
    all attributes (default for the test split as far as n allows), so that each has one right safe image. hazards:
    which ones unsafe scenes carry, as "fire+smoke" (default: all of HAZARDS). Raises ValueError for options out of
    range.

    Besides the items: `safe`, `unsafe` (Scenes); `right`, the unsafe scenes without their hazard (what unsafe
    text should find); uint8 [n, size, size, 3] arrays `safe_images`, `unsafe_images`, `right_images`, and
    `right_texts`, rendered when first used.
    """

    def __init__(
        self,
        n: int = 3000,
        seed: int = 0,
        split: str = "train",
        size: int = 32,
        mismatch: float = 0.7,
        mixed: float = 0.0,
        unique: bool | None = None,
        transform: Transform | None = None,
        hazards: str = "",
    ):
        _check_options(n, seed, split, size, mismatch, mixed)
        unique = split == "test" and n <= COMBINATIONS if unique is None else unique
        generator = np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, SPLITS[split]])))
        self.unsafe = sample_scenes(n, generator, chosen_names(hazards, HAZARDS), unique)
        self.safe = change_attributes(self.unsafe, mismatch, generator).without_hazard()
        self.right = self.unsafe.without_hazard()
        self.size = size
        kind = np.where(generator.random(n) < mixed, generator.integers(1, 3, n), 0)
        self.unsafe_text_labels = (kind != 1).astype(np.int64)
        self.unsafe_image_labels = (kind != 2).astype(np.int64)
        only = f",hazards={hazards}" if hazards else ""
        policy = ErrorPolicy("raise", f"scenes:n={n},seed={seed},split={split}{only}")
        policy.summary.read = n
        super().__init__(LazyRecords(n, self._quadruplet), transform, policy)

    @cached_property
    def safe_images(self) -> np.ndarray:
        return self.safe.render(self.size)

    @cached_property
    def right_images(self) -> np.ndarray:
        return self.right.render(self.size)

    @cached_property
    def unsafe_images(self) -> np.ndarray:
        return self._labeled(self.unsafe_image_labels).render(self.size)

    @cached_property
    def safe_captions(self) -> list[str]:
        return self.safe.captions()

    @cached_property
    def unsafe_captions(self) -> list[str]:
        return self._labeled(self.unsafe_text_labels).captions()

    @cached_property
    def right_texts(self) -> list[str]:
        return self.right.captions()

    def _quadruplet(self, index: int) -> Quadruplet:
        name = self.summary.source
        return Quadruplet(
            safe_image=ImageArray(self.safe_images[index], f"{name}, safe image {index}"),
            safe_text=self.safe_captions[index],
            unsafe_image=ImageArray(self.unsafe_images[index], f"{name}, unsafe image {index}"),
            unsafe_text=self.unsafe_captions[index],
            unsafe_text_label=int(self.unsafe_text_labels[index]),
            unsafe_image_label=int(self.unsafe_image_labels[index]),
            file=name,
            row=index,
        )

    def verify(self, *args: object, **options: object) -> SceneDataset:
        """Rendered images cannot be broken: returns this data set."""
        return self

    def _labeled(self, labels: np.ndarray) -> Scenes:
        """The unsafe scenes, with the hazard only where the label is 1."""
        return Scenes(self.unsafe.codes, np.where(labels == 1, self.unsafe.hazard, NO_HAZARD), self.unsafe.layout)


def pretrain_pairs(n: int, seed: int = 0, size: int = 32, unsafe_share: float = 0.5) -> tuple[np.ndarray, list[str]]:
    """n image-caption pairs to pre-train a small CLIP on: (uint8 [n, size, size, 3], captions).

    A share of `unsafe_share` carries a hazard that the caption names, so that the frozen model knows hazards.
    Half of the captions leave details out at random, as captions from the web do: short prompts (PROMPTS) are then
    familiar, and, where the hazard is what is left out, an unsafe scene stays near its safe self.
    """
    _check_options(n, seed, "pretrain", size, unsafe_share, 0.0)
    generator = np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, SPLITS["pretrain"]])))
    scenes = sample_scenes(n, generator, range(len(HAZARDS)))
    hazard = np.where(generator.random(n) < unsafe_share, scenes.hazard, NO_HAZARD)
    short = generator.random(n) < 0.5
    drop = short[:, None] & (generator.random((n, len(SIZES))) < 0.6)
    named = np.where(short & (generator.random(n) < 0.4), NO_HAZARD, hazard)
    images = Scenes(scenes.codes, hazard, scenes.layout).render(size)
    return images, Scenes(scenes.codes, named, scenes.layout).captions(drop)


def class_names(kind: str = "shape") -> list[str]:
    """Names of zero-shot classes: any attribute ("shape", "color", ...) or "color shape" ("red star", 64
    classes)."""
    if kind == "color shape":
        return [f"{color} {shape}" for color in ATTRIBUTES["color"] for shape in ATTRIBUTES["shape"]]
    if kind in ATTRIBUTES:
        return list(ATTRIBUTES[kind])
    raise ValueError(f'kind must be "color shape" or one of {tuple(ATTRIBUTES)}, not {kind!r}')


def class_labels(scenes: Scenes, kind: str = "shape") -> np.ndarray:
    """int64 [N] indices into class_names(kind)."""
    if kind == "color shape":
        return scenes.codes[:, 1] * SIZES[0] + scenes.codes[:, 0]
    class_names(kind)
    return scenes.codes[:, list(ATTRIBUTES).index(kind)]


def _check_options(n: int, seed: int, split: str, size: int, probability: float, mixed: float) -> None:
    if n < 1 or seed < 0 or not 8 <= size <= 1024:
        raise ValueError(f"scenes need n >= 1, seed >= 0 and 8 <= size <= 1024, got {n}, {seed}, {size}")
    if split not in SPLITS:
        raise ValueError(f"split must be one of {tuple(SPLITS)}, not {split!r}")
    if not 0 <= probability <= 1 or not 0 <= mixed <= 1:
        raise ValueError(f"mismatch, mixed and unsafe_share are probabilities, got {probability} and {mixed}")
