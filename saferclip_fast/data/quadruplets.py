"""The schema of a sample and the data set that serves it."""

from __future__ import annotations

import copy
import functools
import hashlib
import json
import os
import struct
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from ..storage.files import save_json
from .errors import DataError, ErrorPolicy, Summary
from .images import MAX_PIXELS, ImageError, ImageRef, check_max_pixels
from .transforms import ToTensor, Transform

VERIFY_VERSION = 2  # part of the cache key: raise it when the checks change
DECODE_BLOCK = 256  # records in flight in the verify pass: bounds its memory


@dataclass(frozen=True)
class Quadruplet:
    """One sample: a safe pair, an unsafe pair, and where it came from.

    A label of 0 says that this modality of the unsafe side is safe after all (mixed pairs, ShieldCLIP); one between 0
    and 1 is a score of how unsafe it is. Evaluation takes 0.5 and more as unsafe.
    `row` counts the lines of text files from 1, header included, and rows, samples or keys of other formats.
    """

    safe_image: ImageRef
    safe_text: str
    unsafe_image: ImageRef
    unsafe_text: str
    unsafe_text_label: float = 1
    unsafe_image_label: float = 1
    file: str = ""
    row: int = 0

    @property
    def text_is_unsafe(self) -> bool:
        """Whether evaluation counts the text of the unsafe side as unsafe."""
        return self.unsafe_text_label >= 0.5

    @property
    def image_is_unsafe(self) -> bool:
        """The same of its image."""
        return self.unsafe_image_label >= 0.5

    def digest(self) -> bytes:
        """SHA-256 of the sample's content: both images' bytes, both texts, both labels."""
        return _digest(self, self.safe_image.content(), self.unsafe_image.content())


class QuadrupletEmbeddings(NamedTuple):
    """Embeddings of a batch of quadruplets, each [B, d]; row i of all four is one sample."""

    safe_text: Tensor
    safe_image: Tensor
    unsafe_text: Tensor
    unsafe_image: Tensor


class LazyRecords(Sequence[Quadruplet]):
    """`length` quadruplets, each made by `make(index)` when asked for."""

    def __init__(self, length: int, make: Callable[[int], Quadruplet]):
        self.length = length
        self.make = make

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Quadruplet:  # type: ignore[override]  # no slices
        if not -self.length <= index < self.length:
            raise IndexError(f"index {index} of {self.length} records")
        return self.make(index % self.length)


class QuadrupletDataset(Dataset):
    """Map-style data set of quadruplets.

    `records` is any sequence of Quadruplet; `transform` turns an RGB PIL image into a tensor (default:
    float32 [3, H, W] in [0, 1]). An item is a dict: index (int), safe_image, unsafe_image (what transform
    returns), safe_text, unsafe_text (str), unsafe_text_label, unsafe_image_label (0, 1 or between).

    Images are decoded when asked for, and a failure is a DataError naming file and row, whatever `on_error`
    is: skipping in the middle of an epoch would make a resumed run differ. Call `verify()` first to find bad
    images up front; with on_error="skip" it returns the data set without them.
    """

    def __init__(
        self,
        records: Sequence[Quadruplet],
        transform: Transform | None = None,
        policy: ErrorPolicy | None = None,
        max_pixels: int = MAX_PIXELS,
        text_only: bool = False,
    ):
        """text_only: there are no unsafe images; those of the records are their safe ones, labeled safe."""
        self.records = records
        self.text_only = text_only
        self.transform = transform or ToTensor()
        self.max_pixels = check_max_pixels(max_pixels)
        self.policy = policy or ErrorPolicy("raise", "records")
        if policy is None:
            self.policy.summary.read = len(records)
        if len(records) == 0:
            raise DataError(f"no usable quadruplet in {self.summary}")
        self._content_hash: str | None = None

    @property
    def summary(self) -> Summary:
        """Rows read, kept and skipped, with reasons."""
        return self.policy.summary

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> dict[str, Any]:
        record = self.records[index]
        safe_image = self._image(record, record.safe_image)
        return {
            "index": index % len(self.records),
            "safe_image": safe_image,
            "unsafe_image": safe_image if self.text_only else self._image(record, record.unsafe_image),
            "safe_text": record.safe_text,
            "unsafe_text": record.unsafe_text,
            "unsafe_text_label": record.unsafe_text_label,
            "unsafe_image_label": record.unsafe_image_label,
        }

    def _image(self, record: Quadruplet, image: ImageRef) -> torch.Tensor:
        try:
            return self.transform(image.load(self.max_pixels))
        except ImageError as error:
            raise DataError(
                f"{record.file}, row {record.row}: {error} (run verify() before training; with "
                'on_error="skip" it leaves such rows out)'
            ) from error

    def without_unsafe_images(self) -> QuadrupletDataset:
        """The same samples, text-only."""
        records = LazyRecords(len(self), functools.partial(_text_only, self.records))
        return QuadrupletDataset(records, self.transform, self.policy, self.max_pixels, text_only=True)

    @property
    def safe_texts(self) -> list[str]:
        return [record.safe_text for record in self.records]

    @property
    def unsafe_texts(self) -> list[str]:
        return [record.unsafe_text for record in self.records]

    def content_hash(self) -> str:
        """SHA-256 (hex) of all samples' content in order: equal content gives equal hashes wherever it lies.

        Reads every image once; remembered afterwards, and known already after verify().
        """
        if self._content_hash is None:
            self._content_hash = _combine(record.digest() for record in self.records)
        return self._content_hash

    def verify(
        self, cache_dir: str | os.PathLike | None = None, progress: bool = True, workers: int = 4
    ) -> QuadrupletDataset:
        """Decode every image once. on_error="raise": the first bad one is a DataError. "skip": returns the
        data set of the good rows, in order, and counts the others in `summary`.

        The result is kept in `cache_dir` under a key made of the texts, labels, and each image's path, size
        and modification time, so that a second run over unchanged files only looks at their metadata, and a
        resumed run sees exactly the same rows.
        """
        cache = None
        if cache_dir is not None:
            cache = Path(cache_dir) / f"verified-{self._fingerprint()}.json"
        found = _read_cache(cache)
        bad, content_hash = found or self._decode_all(progress, workers)
        policy = copy.deepcopy(self.policy)
        for index, reason in bad.items():
            record = self.records[int(index)]
            policy.bad("bad image", record.file, record.row, reason)
        if cache is not None and found is None:
            save_json(cache, {"bad": bad, "content_hash": content_hash})
        good = self.records
        if bad:
            good = [record for index, record in enumerate(self.records) if str(index) not in bad]
        verified = QuadrupletDataset(good, self.transform, policy, self.max_pixels, self.text_only)
        verified._content_hash = content_hash
        return verified

    def _decode_all(self, progress: bool, workers: int) -> tuple[dict[str, str], str]:
        """(bad index -> reason, content hash of the good rows); stops at the first bad row if that is
        fatal."""
        bad: dict[str, str] = {}
        digests = []
        bar = tqdm(total=len(self), desc="verify images", unit="row", disable=not progress)
        with ThreadPoolExecutor(workers) as pool, bar:
            for start in range(0, len(self), DECODE_BLOCK):
                block = range(start, min(start + DECODE_BLOCK, len(self)))
                for index, result in zip(block, pool.map(self._check, block), strict=True):
                    if isinstance(result, bytes):
                        digests.append(result)
                    else:
                        bad[str(index)] = result
                bar.update(len(block))
                if bad and self.policy.on_error == "raise":
                    break
        return bad, _combine(digests)

    def _check(self, index: int) -> bytes | str:
        """The record's digest, or why it is bad."""
        record = self.records[index]
        try:
            record.safe_image.load(self.max_pixels)
            if not self.text_only:
                record.unsafe_image.load(self.max_pixels)
            return record.digest()
        except ImageError as error:
            return str(error)

    def _fingerprint(self) -> str:
        hasher = hashlib.sha256(f"{VERIFY_VERSION}:{self.max_pixels}:{self.policy.on_error}".encode())
        for record in self.records:
            stamps = []
            for image in (record.safe_image, record.unsafe_image):
                try:
                    stamps.append(image.stamp().encode())
                except ImageError as error:
                    stamps.append(str(error).encode())
            hasher.update(_digest(record, *stamps))
        return hasher.hexdigest()


def _text_only(records: Sequence[Quadruplet], index: int) -> Quadruplet:
    record = records[index]
    return replace(record, unsafe_image=record.safe_image, unsafe_image_label=0)


def check_opened(dataset: object) -> None:
    """Raises DataError, which says how to make one, for a data set of another kind, which does not know its content."""
    if not (hasattr(dataset, "content_hash") and hasattr(dataset, "records")):
        raise DataError(
            f"the data set is a {type(dataset).__name__} without content_hash, by which caches are named: "
            "data.open_rows(DATASET, FOLDER) makes a QuadrupletDataset of any data set of dicts; fine_tune and "
            "evaluate take yours as it is"
        )


def _digest(record: Quadruplet, safe_image: bytes, unsafe_image: bytes) -> bytes:
    hasher = hashlib.sha256()
    pair = (record.unsafe_text_label, record.unsafe_image_label)
    labels = bytes(map(int, pair)) if {0, 1}.issuperset(pair) else struct.pack("<2d", *pair)
    for part in (safe_image, record.safe_text.encode(), unsafe_image, record.unsafe_text.encode(), labels):
        hasher.update(len(part).to_bytes(8, "little"))  # the length keeps ("ab", "c") and ("a", "bc") apart
        hasher.update(part)
    return hasher.digest()


def _combine(digests: Iterable[bytes]) -> str:
    hasher = hashlib.sha256()
    for digest in digests:
        hasher.update(digest)
    return hasher.hexdigest()


def _read_cache(path: Path | None) -> tuple[dict[str, str], str] | None:
    if path is None or not path.is_file():
        return None
    try:
        found = json.loads(path.read_bytes())
        return dict(found["bad"]), str(found["content_hash"])
    except (ValueError, KeyError, TypeError):
        return None  # a damaged cache costs a second pass, nothing else
