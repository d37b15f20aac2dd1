"""Images as resizing and cropping leave them, uint8, in one memory-mapped file: no epoch decodes anything.

Bit for bit the same training inputs, since what follows (uint8 to float, normalization) is done as without the file.
Random augmentations cannot be kept in a file; training has none.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..runtime.ranks import Ranks
from ..storage import row_cache
from .errors import DataError
from .images import DECODING, MAX_PIXELS, ImageRef
from .quadruplets import LazyRecords, Quadruplet, QuadrupletDataset, check_opened
from .transforms import ToTensor, Transform

FORMAT = "saferclip_fast.decoded.v1"
SIDES = ("safe_image", "unsafe_image")
TENSORS = (*SIDES, *(f"{side}_crc32" for side in SIDES))
_BATCH = 64


def decode_images(
    dataset: QuadrupletDataset,
    cache_dir: str | Path,
    *,
    num_workers: int = 0,
    progress: bool = True,
    ranks: Ranks = Ranks(),  # noqa: B008 - it is immutable
) -> QuadrupletDataset:
    """A data set with the items of `dataset`, bit for bit, whose images come from a file in `cache_dir`.

    The file takes 6 H W + 16 bytes a sample, and is named by a hash of the data and of what resizing makes of it. It is
    made once: a killed run goes on where it was, other processes and ranks wait and share it. Each image has a CRC-32,
    checked whenever it is read.

    Args:
        dataset: its transform is open_clip's for validation, or data.ToTensor.
        num_workers: loader processes that decode.
        progress: show a bar.
        ranks: the processes that share the work; `cache_dir` must be one folder for all of them.

    Raises:
        ValueError: a transform that does not resize first and convert then, images that differ in size after it, or a
            file that is damaged or belongs to other data.
        DataError: an image that cannot be read, with file and row.
        OSError: no room for the file; nothing is left behind.
    """
    check_opened(dataset)
    resize, convert = _split(dataset.transform)
    resized = copy.copy(dataset)
    resized.transform = resize  # type: ignore[assignment]
    metadata = {
        "format": FORMAT,
        "data_hash": dataset.content_hash(),
        "decoding": DECODING,
        "resizing": repr(resize),
        "probe": _probe(resized),
        "rows": str(len(dataset)),
    }
    path = row_cache.fill(
        cache_dir,
        "decoded",
        metadata,
        resized,
        _stack,
        lambda batch: {name: batch[name] for name in TENSORS},
        batch_size=_BATCH,
        num_workers=num_workers,
        title="decode images",
        progress=progress,
        ranks=ranks,
    )
    records = LazyRecords(len(dataset), functools.partial(_record, dataset.records, DecodedFile(path, metadata)))
    decoded = QuadrupletDataset(records, convert, dataset.policy, dataset.max_pixels, dataset.text_only)
    decoded._content_hash = dataset.content_hash()
    return decoded


class DecodedFile:
    """The images of a file that decode_images made; each process maps it for itself."""

    def __init__(self, path: Path, expect: dict[str, str]) -> None:
        """Raises ValueError where the file is damaged or was made from something else than `expect` says."""
        self.path, self.expect = path, expect
        self.tensors: dict[str, Tensor] | None = None
        self._mapped()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "tensors": None}  # a loader process that was not forked must not get a copy of it all

    def image(self, side: str, row: int) -> Image.Image:
        """RGB image `row` of `side`. Raises DataError where it is not as it was written."""
        tensors = self._mapped()
        pixels = tensors[side][row].numpy()
        if zlib.crc32(pixels.data) != int(tensors[f"{side}_crc32"][row]):
            raise DataError(
                f"{self.path} is damaged: {side} {row} is not as it was written; delete the file to make it again"
            )
        return Image.fromarray(pixels)

    def _mapped(self) -> dict[str, Tensor]:
        if self.tensors is None:
            tensors, _ = row_cache.read(self.path, TENSORS, self.expect)
            for side in SIDES:
                pixels, checksums = tensors[side], tensors[f"{side}_crc32"]
                if pixels.dtype != torch.uint8 or pixels.shape[3:] != (3,) or checksums.dim() != 1:
                    raise ValueError(f"{self.path} is damaged (no images of {side}); delete it to make it again")
            self.tensors = tensors
        return self.tensors


@dataclass(frozen=True)
class DecodedImage:
    """ImageRef: the pixels of `origin` after resizing and cropping."""

    file: DecodedFile
    side: str
    row: int
    origin: ImageRef

    def __str__(self) -> str:
        return str(self.origin)

    def content(self) -> bytes:
        return self.origin.content()

    def stamp(self) -> str:
        return self.origin.stamp()

    def load(self, max_pixels: int = MAX_PIXELS) -> Image.Image:
        return self.file.image(self.side, self.row)


@dataclass(frozen=True)
class _Resize:
    """Transform: RGB image -> uint8 [H, W, 3] by the steps before the conversion to numbers."""

    steps: tuple[Any, ...]

    def __repr__(self) -> str:
        return re.sub(" at 0x[0-9a-f]+", "", repr(list(self.steps)))  # caches are keyed by it

    def __call__(self, image: Image.Image) -> Tensor:
        for step in self.steps:
            image = step(image)
        return torch.from_numpy(np.array(image, dtype=np.uint8))


def _split(transform: Transform) -> tuple[_Resize, Transform]:
    """The transform in two: from the image to uint8 pixels, and from these to the tensor. Raises ValueError."""
    from torchvision import transforms

    if isinstance(transform, ToTensor):
        return _Resize(()), transform
    steps = list(getattr(transform, "transforms", []))
    middle = next((i for i, step in enumerate(steps) if isinstance(step, transforms.ToTensor)), None)
    if middle is None or any("Random" in type(step).__name__ for step in steps):
        raise ValueError(
            "data.decoded_cache needs a transform that resizes and crops, without chance, and then converts "
            f"(torchvision's ToTensor), not {transform!r}: use data.decoded_cache=false"
        )
    return _Resize(tuple(steps[:middle])), transforms.Compose(steps[middle:])


def _record(records: Sequence[Quadruplet], file: DecodedFile, row: int) -> Quadruplet:
    record = records[row]
    safe, unsafe = (DecodedImage(file, side, row, getattr(record, side)) for side in SIDES)
    return replace(record, safe_image=safe, unsafe_image=unsafe)


def _stack(samples: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
    """Items of the resized data set to a batch: "index" and TENSORS."""
    batch = {"index": torch.tensor([sample["index"] for sample in samples])}
    for side in SIDES:
        sizes = {tuple(sample[side].shape) for sample in samples}
        if len(sizes) > 1:
            raise ValueError(f"images differ in size after resizing ({sizes}): use data.decoded_cache=false")
        batch[side] = torch.stack([sample[side] for sample in samples])
        batch[f"{side}_crc32"] = torch.tensor([zlib.crc32(sample[side].numpy()) for sample in samples])
    return batch


def _probe(resized: QuadrupletDataset) -> str:
    """A hash of what resizing makes of a few samples: another version of the decoder may give other pixels."""
    digest = hashlib.sha256()
    for index in sorted({i * (len(resized) - 1) // 3 for i in range(4)}):
        item = resized[index]
        for side in SIDES:
            digest.update(f"{tuple(item[side].shape)}".encode())
            digest.update(item[side].numpy().data)
    return digest.hexdigest()
