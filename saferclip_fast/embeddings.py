"""Frozen embeddings of a whole data set: computed once, kept on disk by content, memory-mapped when read."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from .bank import SafeBank
from .data import QuadrupletDataset, collate
from .data.captions import trim
from .data.images import DECODING
from .data.packed_captions import PackedCaptions
from .data.quadruplets import QuadrupletEmbeddings, check_opened
from .models import ClipModel
from .runtime.precision import autocast
from .runtime.ranks import Ranks
from .storage import row_cache

FORMAT = "saferclip_fast.embeddings.v1"
NAMES = QuadrupletEmbeddings._fields
BATCH_INPUTS = ("safe_image", "unsafe_image", "safe_tokens", "unsafe_tokens")
Encode = Callable[[Tensor, Tensor | PackedCaptions], tuple[Tensor, Tensor]]  # ClipModel.forward


class FrozenEmbeddings(NamedTuple):
    """The result of embed_quadruplets: rows mapped from a file, and the file's metadata."""

    embeddings: QuadrupletEmbeddings  # four tensors [N, d] float32 on the CPU, mapped from the file, not normalized
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
    title: str = "frozen embeddings",
    ranks: Ranks = Ranks(),  # noqa: B008 - it is immutable
) -> FrozenEmbeddings:
    """The frozen `clip`'s embeddings of every sample of `dataset`, row i for sample i.

    The file's name is a hash of everything that the rows depend on, so a changed model, data set or preprocessing
    never meets stale rows. A run that was killed goes on where its last synced row was; a second process
    waits for the first one and then reads its file.

    Args:
        clip: the model, under LoRA or frozen (`clip.frozen()` is used).
        dataset: its transform must be deterministic (`clip.preprocess` is).
        cache_dir: folder for the files.
        batch_size, num_workers: of the one pass over the data.
        precision: "fp32", or autocast "bf16" / "fp16"; rows are stored in float32 either way.
        progress: show a bar, called `title`.
        ranks: the processes that share the work; `cache_dir` must be one folder for all of them.

    Raises:
        ValueError: the data set is empty.
        OSError: no room for the file (checked before the first row), or it cannot be written.
        data.DataError: an image that cannot be read, with file and row.
    """
    check_opened(dataset)
    if len(dataset) == 0:
        raise ValueError(f"the data set is empty, nothing to embed ({dataset.summary})")
    metadata = {
        "format": FORMAT,
        "model": clip.name,
        "weights_hash": clip.weights_hash,
        "data_hash": dataset.content_hash(),
        "preprocessing": _preprocessing(clip, dataset),
        "decoding": DECODING,
        "precision": precision,
        "rows": str(len(dataset)),
    }

    def compute(batch: Mapping[str, Any]) -> dict[str, Tensor]:
        with clip.frozen():
            rows = embed_batch(clip, batch, precision)
            return {name: column.float() for name, column in rows._asdict().items()}

    path = row_cache.fill(
        cache_dir,
        "embeddings",
        metadata,
        dataset,
        collate(clip.tokenizer),
        compute,
        batch_size=batch_size,
        num_workers=num_workers,
        title=title,
        progress=progress,
        ranks=ranks,
    )
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
    tensors, metadata = row_cache.read(path, NAMES, expect)
    if len({x.shape for x in tensors.values()}) > 1 or tensors[NAMES[0]].dim() != 2:
        raise ValueError(f"{path} is damaged (its tensors do not fit together); delete it to make it again")
    return FrozenEmbeddings(QuadrupletEmbeddings(**tensors), metadata, path)


def bank_from(frozen: FrozenEmbeddings, index: Tensor | None = None) -> SafeBank:
    """The bank of the safe pairs at `index` (int64 [M], default all), on the CPU, with metadata of their source."""
    text, image = frozen.embeddings.safe_text, frozen.embeddings.safe_image
    if index is not None:
        text, image = text[index], image[index]
    return SafeBank(text, image, bank_metadata(frozen))


def bank_metadata(frozen: FrozenEmbeddings) -> dict[str, str]:
    """The model, weights, data and preprocessing behind these rows, for the bank's file."""
    return {key: frozen.metadata[key] for key in ("model", "weights_hash", "data_hash", "preprocessing")}


def embed_batch(
    clip: ClipModel, batch: Mapping[str, Any], precision: str = "fp32", encode: Encode | None = None
) -> QuadrupletEmbeddings:
    """Embeddings [B, d] of one collated batch: two forward passes, safe and unsafe rows together.

    A text-only batch has no unsafe images, and their embeddings are those of the safe ones.

    float32, or on a GPU what the encoders give: half the bytes, and the losses multiply them on tensor cores.
    `encode` runs in place of `clip` itself where it is wrapped (DistributedDataParallel, torch.compile).
    """
    device = clip.device
    # joined on the device: the copies from pinned memory then overlap with its work
    on_device = {name: batch[name].to(device, non_blocking=True) for name in BATCH_INPUTS if name in batch}
    text_only = "unsafe_image" not in batch
    images = on_device["safe_image"] if text_only else torch.cat([on_device["safe_image"], on_device["unsafe_image"]])
    tokens = _join(on_device["safe_tokens"], on_device["unsafe_tokens"], clip.pad_id)
    captions = clip.pack(tokens, [*batch["safe_lengths"], *batch["unsafe_lengths"]])
    with autocast(device, precision):
        image, text = (clip if encode is None else encode)(images, captions)
    if device.type != "cuda":
        image, text = image.float(), text.float()
    safe_image, unsafe_image = (image, image) if text_only else image.chunk(2)
    safe_text, unsafe_text = text.chunk(2)
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
    embeddings, labels = [], []
    for batch, label in tqdm(loader, desc=f"embed {name}", disable=not progress):
        with autocast(clip.device, precision):
            embeddings.append(clip.encode_image(batch.to(clip.device, non_blocking=True)).float().cpu())
        labels.append(label)
    return torch.cat(embeddings), torch.cat(labels)


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
    embeddings = []
    for start in tqdm(range(0, len(texts), batch_size), desc=f"embed {name}", disable=not progress):
        tokens = trim(clip.tokenizer(list(texts[start : start + batch_size])), clip.pad_id).to(clip.device)
        with autocast(clip.device, precision):
            embeddings.append(clip.encode_text(tokens).float().cpu())
    return torch.cat(embeddings)


def _join(first: Tensor, second: Tensor, pad: int) -> Tensor:
    """Rows of two trimmed token batches [B, L1], [B, L2], padded to the longer: [2B, max(L1, L2)]."""
    length = max(first.shape[1], second.shape[1])
    return torch.cat([torch.nn.functional.pad(t, (0, length - t.shape[1]), value=pad) for t in (first, second)])


def _preprocessing(clip: ClipModel, dataset: QuadrupletDataset) -> str:
    """The model's settings, and a hash of what the data set's own transform makes of a few samples."""
    digest = hashlib.sha256()
    for index in sorted({i * (len(dataset) - 1) // 3 for i in range(4)}):
        item = dataset[index]
        for image in (item["safe_image"], item["unsafe_image"]):
            digest.update(f"{image.dtype} {tuple(image.shape)}".encode())
            digest.update(image.contiguous().numpy().data)
    return json.dumps({**clip.preprocessing, "probe": digest.hexdigest()}, sort_keys=True)
