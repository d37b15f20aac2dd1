"""Frozen embeddings of a whole data set: computed once, kept on disk by content, memory-mapped when read."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset
from tqdm import tqdm

from .bank import SafeBank
from .data import QuadrupletDataset, collate
from .data.pack import PackedCaptions
from .data.trim import trim
from .device import autocast
from .files import save_json, sync
from .models import ClipModel
from .objectives import QuadrupletEmbeddings

FORMAT = "saferclip_fast.embeddings.v1"
NAMES = QuadrupletEmbeddings._fields
BATCH_INPUTS = ("safe_image", "unsafe_image", "safe_tokens", "unsafe_tokens")
Encode = Callable[[Tensor, Tensor | PackedCaptions], tuple[Tensor, Tensor]]  # ClipModel.forward
_SYNC_ROWS = 4096  # at most so many rows are computed again after a kill


class FrozenEmbeddings(NamedTuple):
    rows: QuadrupletEmbeddings  # four tensors [N, d] float32 on the CPU, mapped from the file, not normalised
    metadata: dict[str, str]  # model, weights_hash, data_hash, preprocessing, precision
    path: Path


def embed_quadruplets(
    clip: ClipModel,
    dataset: QuadrupletDataset,
    cache_dir: str | Path,
    *,
    batch_size: int = 256,
    num_workers: int = 0,
    precision: str = "fp32",
    progress: bool = True,
) -> FrozenEmbeddings:
    """What the frozen `clip` makes of every sample of `dataset`, row i for sample i.

    The file's name is a hash of everything that the rows depend on, so a changed model, data set or preprocessing
    never meets stale rows. A run that was killed goes on where its last synced row was; a second process
    waits for the first one and then reads its file.

    Args:
        clip: the model, under LoRA or frozen (`clip.frozen()` is used).
        dataset: its transform must be deterministic (`clip.preprocess` is).
        cache_dir: folder for the files.
        batch_size, num_workers: of the one pass over the data.
        precision: "fp32", or autocast "bf16" / "fp16"; rows are stored in float32 either way.
        progress: show a bar.

    Raises:
        ValueError: the data set is empty.
        OSError: no room for the file (checked before the first row), or it cannot be written.
        data.DataError: an image that cannot be read, with file and row.
    """
    if len(dataset) == 0:
        raise ValueError(f"the data set is empty, nothing to embed ({dataset.summary})")
    metadata = {
        "format": FORMAT,
        "model": clip.name,
        "weights_hash": clip.weights_hash,
        "data_hash": dataset.content_hash(),
        "preprocessing": _preprocessing(clip, dataset),
        "precision": precision,
        "rows": str(len(dataset)),
    }
    key = hashlib.sha256(json.dumps(metadata, sort_keys=True).encode()).hexdigest()[:24]
    path = Path(cache_dir) / f"embeddings-{key}.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    with _lock(path.with_suffix(".lock")):
        if not path.is_file():
            _compute(clip, dataset, path, metadata, batch_size, num_workers, precision, progress)
    return load_embeddings(path, metadata)


def load_embeddings(path: str | Path, expect: Mapping[str, str] | None = None) -> FrozenEmbeddings:
    """Map an embeddings file; rows are read from disk when they are used.

    Raises:
        FileNotFoundError: no such file.
        ValueError: damaged, or made from something else than `expect` says; names the field and the remedy.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no embeddings at {path}; embed_quadruplets makes them")
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            metadata = dict(file.metadata() or {})
            rows = QuadrupletEmbeddings(*(file.get_tensor(name) for name in NAMES))
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged ({error}); delete it to compute it again") from error
    for key, wanted in (expect or {}).items():
        if metadata.get(key) != wanted:
            raise ValueError(
                f"{path} was made with {key}={metadata.get(key)!r}, but {key}={wanted!r} is in use; "
                "delete the file to compute it again, or use the model and data that it was made from"
            )
    return FrozenEmbeddings(rows, metadata, path)


def bank_from(frozen: FrozenEmbeddings, rows: Tensor | None = None) -> SafeBank:
    """The bank of the safe pairs at `rows` (int64 [M], default all), on the CPU; its metadata says what they are of."""
    text, image = frozen.rows.safe_text, frozen.rows.safe_image
    if rows is not None:
        text, image = text[rows], image[rows]
    metadata = {key: frozen.metadata[key] for key in ("model", "weights_hash", "data_hash", "preprocessing")}
    return SafeBank(text, image, metadata)


@torch.no_grad()
def _compute(clip, dataset, path, metadata, batch_size, num_workers, precision, progress) -> None:
    file: _PartialFile | None = None
    progress_file = path.with_suffix(".progress.json")
    done = _rows_done(progress_file, path.with_suffix(".partial"))
    loader = DataLoader(
        Subset(dataset, range(done, len(dataset))),
        batch_size,
        collate_fn=collate(clip.tokenizer),
        num_workers=num_workers,
        generator=torch.Generator(),  # leaves the global generator alone
    )
    with clip.frozen(), tqdm(total=len(dataset), initial=done, desc="frozen embeddings", disable=not progress) as bar:
        unsynced = 0
        for batch in loader:
            rows = embed_batch(clip, batch, precision)
            if file is None:
                shape = (len(dataset), rows.safe_text.shape[1])
                file = _PartialFile(path.with_suffix(".partial"), shape, metadata, fresh=done == 0)
            file.write(done, rows)
            done += len(batch["index"])
            unsynced += len(batch["index"])
            bar.update(len(batch["index"]))
            if unsynced >= _SYNC_ROWS:
                file.sync()
                save_json(progress_file, {"rows": done})
                unsynced = 0
    if file is not None:
        file.sync()
        file.close()
    path.with_suffix(".partial").replace(path)
    sync(path.parent)
    progress_file.unlink(missing_ok=True)


def embed_batch(
    clip: ClipModel, batch: Mapping[str, Any], precision: str = "fp32", encode: Encode | None = None
) -> QuadrupletEmbeddings:
    """Embeddings [B, d] float32 of one collated batch: two forward passes, safe and unsafe rows together.

    `encode` runs in place of `clip` itself where it is wrapped (DistributedDataParallel, torch.compile).
    """
    device = clip.device
    # joined on the device: the copies from pinned memory then overlap with its work
    on_device = {name: batch[name].to(device, non_blocking=True) for name in BATCH_INPUTS}
    images = torch.cat([on_device["safe_image"], on_device["unsafe_image"]])
    tokens = _join(on_device["safe_tokens"], on_device["unsafe_tokens"], clip.pad_id)
    captions = clip.pack(tokens, [*batch["safe_lengths"], *batch["unsafe_lengths"]])
    with autocast(device, precision):
        image, text = (encode or clip)(images, captions)
    safe_image, unsafe_image = image.float().chunk(2)
    safe_text, unsafe_text = text.float().chunk(2)
    return QuadrupletEmbeddings(safe_text, safe_image, unsafe_text, unsafe_image)


@torch.no_grad()
def embed_images(
    clip: ClipModel,
    images: Dataset,
    *,
    batch_size: int = 256,
    num_workers: int = 0,
    precision: str = "fp32",
    progress: bool = True,
    name: str = "images",
) -> tuple[Tensor, Tensor]:
    """Embeddings [N, d] float32 and labels int64 [N], on the CPU, of a data set of (image tensor, label)."""
    clip.eval()
    loader = DataLoader(images, batch_size, num_workers=num_workers, generator=torch.Generator())
    rows, labels = [], []
    for batch, label in tqdm(loader, desc=f"embed {name}", disable=not progress):
        with autocast(clip.device, precision):
            rows.append(clip.encode_image(batch.to(clip.device, non_blocking=True)).float().cpu())
        labels.append(label)
    return torch.cat(rows), torch.cat(labels)


@torch.no_grad()
def embed_texts(
    clip: ClipModel,
    texts: Sequence[str],
    *,
    batch_size: int = 256,
    precision: str = "fp32",
    progress: bool = True,
    name: str = "texts",
) -> Tensor:
    """Embeddings [N, d] float32, on the CPU, of `texts`."""
    clip.eval()
    rows = []
    for start in tqdm(range(0, len(texts), batch_size), desc=f"embed {name}", disable=not progress):
        tokens = trim(clip.tokenizer(list(texts[start : start + batch_size])), clip.pad_id).to(clip.device)
        with autocast(clip.device, precision):
            rows.append(clip.encode_text(tokens).float().cpu())
    return torch.cat(rows)


def _join(first: Tensor, second: Tensor, pad: int) -> Tensor:
    """Rows of two trimmed token batches [B, L1], [B, L2], padded to the longer: [2B, max(L1, L2)]."""
    length = max(first.shape[1], second.shape[1])
    return torch.cat([torch.nn.functional.pad(t, (0, length - t.shape[1]), value=pad) for t in (first, second)])


class _PartialFile:
    """A safetensors file of full size whose rows are filled in from the start; space is taken at once."""

    def __init__(self, path: Path, shape: tuple[int, int], metadata: Mapping[str, str], fresh: bool) -> None:
        size = shape[0] * shape[1] * 4
        header: dict = {"__metadata__": dict(metadata)}
        for i, name in enumerate(NAMES):
            header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [i * size, (i + 1) * size]}
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)  # safetensors wants 8-byte aligned data
        self.row_bytes = shape[1] * 4
        self.starts = [8 + len(text) + i * size for i in range(len(NAMES))]
        self.descriptor = os.open(path, os.O_RDWR | os.O_CREAT | (os.O_TRUNC if fresh else 0), 0o644)
        total = 8 + len(text) + len(NAMES) * size
        try:
            _reserve(self.descriptor, total)
        except OSError as error:
            path.unlink()
            raise OSError(
                error.errno, f"no room for {total / 1e9:.2f} GB of embeddings in {path.parent} ({error.strerror})"
            ) from error
        os.pwrite(self.descriptor, len(text).to_bytes(8, "little") + text, 0)

    def write(self, first: int, rows: QuadrupletEmbeddings) -> None:
        for start, tensor in zip(self.starts, rows, strict=True):
            data = tensor.cpu().contiguous().numpy().data.cast("B")
            os.pwrite(self.descriptor, data, start + first * self.row_bytes)

    def sync(self) -> None:
        os.fsync(self.descriptor)

    def close(self) -> None:
        os.close(self.descriptor)


def _reserve(descriptor: int, size: int) -> None:
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(descriptor, 0, size)
    else:  # macOS
        os.ftruncate(descriptor, size)


def _preprocessing(clip: ClipModel, dataset: QuadrupletDataset) -> str:
    """The model's settings, and a hash of what the data set's own transform makes of a few samples."""
    digest = hashlib.sha256()
    for index in sorted({i * (len(dataset) - 1) // 3 for i in range(4)}):
        item = dataset[index]
        for image in (item["safe_image"], item["unsafe_image"]):
            digest.update(f"{image.dtype} {tuple(image.shape)}".encode())
            digest.update(image.contiguous().numpy().data)
    return json.dumps({**clip.preprocessing, "probe": digest.hexdigest()}, sort_keys=True)


def _rows_done(progress_file: Path, partial: Path) -> int:
    """Rows that a killed run left behind for certain."""
    try:
        return json.loads(progress_file.read_text())["rows"] if partial.is_file() else 0
    except (OSError, ValueError, KeyError):
        return 0


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Held by one process at a time; released by the system when the process ends, however it ends."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
