"""Images with class labels for zero-shot classification: class folders, WebDataset shards, clip_benchmark, demos.

Every source becomes `LabeledImages`: class names, prompt templates where the source has its own, and a map-style data
set of (tensor, label) under a transform.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import Dataset
from tqdm import tqdm

from .errors import DataError, ErrorPolicy
from .images import ImageArray, ImageError, ImageFile, ImageRef
from .open import parse_options
from .places import shard_paths
from .readers.rows import RowError
from .readers.shards import IMAGE_SUFFIXES, read_text, shard_samples
from .synthetic import photos, scenes
from .transforms import ToTensor, Transform

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm")
DECODERS = 4  # threads
CLASS_NAMES_FILE = "classnames.txt"  # beside shards, one name a line, as clip_benchmark lays them out
TEMPLATES_FILE = "zeroshot_classification_templates.txt"


@dataclass
class LabeledImages:
    """A zero-shot data set.

    name: what figures call it. class_names: one for each label. templates: prompts with {} for the class name, or None
    where the source has none. open: transform -> data set of (image tensor, label).
    """

    name: str
    class_names: Sequence[str]
    templates: Sequence[str] | None
    open: Callable[[Transform], Dataset]

    @classmethod
    def of(
        cls,
        name: str,
        images: Sequence[ImageRef],
        labels: Sequence[int],
        class_names: Sequence[str],
        templates: Sequence[str] | None = None,
    ) -> LabeledImages:
        """From images and their labels, int in [0, len(class_names)); raises DataError where these do not fit."""
        if not len(images):
            raise DataError(f"{name} holds no image")
        if len(images) != len(labels) or not all(0 <= label < len(class_names) for label in labels):
            raise DataError(
                f"{name}: {len(images)} images, {len(labels)} labels from {min(labels)} to {max(labels)} and "
                f"{len(class_names)} class names do not fit together"
            )
        return cls(name, class_names, templates, lambda transform: ImageDataset(images, labels, transform))


class ImageDataset(Dataset):
    """(tensor, label) of image i; a broken image is a DataError that names it."""

    def __init__(self, images: Sequence[ImageRef], labels: Sequence[int], transform: Transform):
        self.images, self.labels, self.transform = images, labels, transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        try:
            return self.transform(self.images[index].load()), int(self.labels[index])
        except ImageError as error:
            raise DataError(f"{error} (delete or repair it)") from error


def open_labeled(source: str, name: str | None = None) -> LabeledImages:
    """Open `source`, choosing the reader by its form.

    FOLDER with a folder of images for each class (CLASS/NAME.jpg); shards (a .tar, a folder of them, a glob or braces)
    of (jpg|png|webp, cls) samples with classnames.txt and, optionally, zeroshot_classification_templates.txt beside
    them or one folder above; "clip_benchmark:SET,root=FOLDER"; "scenes:n=...,seed=..." and "photos:path=FILE.tar".

    name: what figures call it, by default made of the source.

    Raises DataError for input that cannot be used, ImportError where clip_benchmark is not installed.
    """
    scheme, _, options = source.partition(":")
    if scheme in OPENERS:
        return OPENERS[scheme](name or scheme, source, options)
    path = Path(source)
    if path.is_dir() and not any(path.glob("*.tar")):
        return read_class_folders(path, name or path.resolve().name)
    return read_class_shards(source, name or path.stem)


def image_files(folder: str | Path) -> list[ImageFile]:
    """All images under `folder`, at any depth, in order of their paths. Raises DataError where there is none."""
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(f"no such folder of images: {folder}")
    found = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
    if not found:
        raise DataError(f"{folder} holds no image ({', '.join(SUFFIXES)})")
    return [ImageFile(str(path)) for path in found]


def readable_images(folder: str | Path, on_error: str = "raise", progress: bool = True) -> list[ImageFile]:
    """image_files without those that cannot be decoded: each is reported, and a DataError unless on_error is "skip"."""
    images = image_files(folder)
    policy = ErrorPolicy(on_error, str(folder))
    policy.summary.read = len(images)
    good = []
    with ThreadPoolExecutor(DECODERS) as pool:
        problems = tqdm(pool.map(_problem, images), "verify images", len(images), disable=not progress)
        for row, (image, problem) in enumerate(zip(images, problems, strict=True), start=1):
            if problem:
                policy.bad("bad image", str(folder), row, problem)
            else:
                good.append(image)
    if policy.summary.skipped:
        print(policy.summary, flush=True)
    if not good:
        raise DataError(f"{folder} holds no image that can be read")
    return good


def _problem(image: ImageFile) -> str:
    try:
        image.load()
    except ImageError as error:
        return str(error)
    return ""


def read_class_folders(folder: Path, name: str) -> LabeledImages:
    """FOLDER/CLASS/NAME.jpg; a class is called as its folder, underscores read as spaces."""
    classes = sorted(path for path in folder.iterdir() if path.is_dir())
    if len(classes) < 2:
        raise DataError(f"{folder} must hold a folder of images for each of at least two classes")
    images, labels = [], []
    for label, path in enumerate(classes):
        files = image_files(path)
        images += files
        labels += [label] * len(files)
    return LabeledImages.of(name, images, labels, [path.name.replace("_", " ") for path in classes])


def read_class_shards(source: str, name: str) -> LabeledImages:
    """Shards of samples KEY.jpg (or jpeg, png, webp) and KEY.cls, the number of the class in classnames.txt."""
    images: list[ImageRef] = []
    labels: list[int] = []
    paths = shard_paths(source)
    for path in paths:
        for row, (key, members) in enumerate(shard_samples(path), start=1):
            image = next((members[suffix] for suffix in IMAGE_SUFFIXES if suffix in members), None)
            if image is None or "cls" not in members:
                raise DataError(
                    f"{path}, row {row}: sample {key!r} needs an image ({', '.join(IMAGE_SUFFIXES)}) and cls"
                )
            try:
                text = read_text(members["cls"]).strip()
            except (RowError, ImageError) as error:
                raise DataError(f"{path}, row {row}: sample {key!r}: {error}") from error
            if not text.isdecimal() or len(text) > 9:
                raise DataError(f"{path}, row {row}: cls of sample {key!r} must be a class number, not {text!r:.40}")
            images.append(image)
            labels.append(int(text))
    class_names = _beside(paths[0], CLASS_NAMES_FILE)
    if class_names is None:
        raise DataError(f"no {CLASS_NAMES_FILE} beside {paths[0]} or one folder above: one class name a line")
    templates = _beside(paths[0], TEMPLATES_FILE)
    return LabeledImages.of(name, images, labels, _lines(class_names), template_lines(templates) if templates else None)


def template_lines(path: Path) -> list[str]:
    """The prompt templates of a text file, one a line, each with {} or {c} (returned as {}) for the class name.

    Raises DataError for another line, and for a file without any.
    """
    lines = [line.replace("{c}", "{}") for line in _lines(path)]
    for number, line in enumerate(lines, start=1):
        if line.count("{}") != 1:
            raise DataError(f"{path}, template {number}: write {{}} once, where the class name goes, not {line!r:.60}")
    if not lines:
        raise DataError(f"{path} holds no template")
    return lines


def _lines(path: Path) -> list[str]:
    try:
        return [line for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start})") from error


def _beside(shard: str, name: str) -> Path | None:
    folder = Path(shard).resolve().parent
    return next((path for path in (folder / name, folder.parent / name) if path.is_file()), None)


def of_scenes(dataset: scenes.SceneDataset, kind: str = "color shape") -> LabeledImages:
    """The unsafe scenes of `dataset` without their hazard, classed by `kind` (see scenes.class_names)."""
    images = [ImageArray(image, f"scene {i}") for i, image in enumerate(dataset.right_images)]
    labels = np.asarray(scenes.class_labels(dataset.right, kind)).tolist()
    return LabeledImages.of("scenes", images, labels, scenes.class_names(kind), scenes.PROMPTS)


def of_photos(dataset: photos.PhotoDataset) -> LabeledImages:
    """The unsafe photographs of `dataset` without their sign, by class."""
    images = [ImageArray(image, f"photograph {i}") for i, image in enumerate(dataset.right_images)]
    names = [photos.with_article(name) for name in dataset.class_names]
    return LabeledImages.of("photos", images, dataset.unsafe_labels.tolist(), names, photos.TEMPLATES)


def _open_scenes(name: str, source: str, options: str) -> LabeledImages:
    return _renamed(of_scenes(_generated(scenes.SceneDataset, source, options)), name)


def _open_photos(name: str, source: str, options: str) -> LabeledImages:
    return _renamed(of_photos(_generated(photos.PhotoDataset, source, options)), name)


def _renamed(images: LabeledImages, name: str) -> LabeledImages:
    images.name = name
    return images


def _generated(kind: Callable[..., Any], source: str, options: str) -> Any:
    given = {"split": "test", **parse_options(options)}
    known = sorted(set(inspect.signature(kind).parameters) - {"transform"})
    if unknown := sorted(set(given) - set(known)):
        raise DataError(f"{source!r} has no option {', '.join(unknown)}; known: {', '.join(known)}")
    return kind(**given)


def _open_clip_benchmark(name: str, source: str, options: str) -> LabeledImages:
    """A data set of clip_benchmark with its class names and templates: "SET,root=FOLDER[,split=test]"."""
    try:
        from clip_benchmark.datasets.builder import build_dataset
    except ImportError as error:
        raise ImportError(
            f"{source} needs clip_benchmark: pip install 'saferclip-fast[evaluate]' "
            "(class folders and shards need nothing)"
        ) from error
    chosen, _, rest = options.partition(",")
    given: dict[str, Any] = {"root": ".", "split": "test", **parse_options(rest)}
    if unknown := sorted(set(given) - {"root", "split", "download"}):
        raise DataError(f"{source!r} has no option {', '.join(unknown)}; known: root, split, download")
    # clip_benchmark would run wget through a shell to fill a folder that is not there
    if not Path(given["root"]).is_dir():
        raise DataError(f"{source}: no folder {given['root']}; make it first, data sets are downloaded into it")

    def build(transform: Transform) -> Any:
        try:
            return build_dataset(chosen, transform=transform, **given)
        except (ValueError, RuntimeError, OSError, AssertionError) as error:
            raise DataError(f"clip_benchmark cannot open {chosen!r} in {given['root']}: {error}") from error

    first = build(ToTensor())
    if not hasattr(first, "__len__"):
        raise DataError(f"{source}: clip_benchmark's WebDataset sets are read as shards, pass their folder itself")
    if not getattr(first, "classes", None) or not isinstance(getattr(first, "templates", None), list):
        raise DataError(f"{source}: clip_benchmark has no class names and templates for {chosen!r}")
    templates = [template.replace("{c}", "{}") for template in first.templates]
    return LabeledImages(name if name != "clip_benchmark" else chosen, list(first.classes), templates, build)


OPENERS: dict[str, Callable[[str, str, str], LabeledImages]] = {
    "scenes": _open_scenes,
    "photos": _open_photos,
    "clip_benchmark": _open_clip_benchmark,
}
