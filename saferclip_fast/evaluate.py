"""What changed: retrieval, zero-shot accuracy and drift of a model on held-out quadruplets."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from .data import QuadrupletDataset, collate
from .embeddings import embed_batch
from .models import ClipModel
from .objectives import QuadrupletEmbeddings
from .ops import nearest_safe

_IMAGE_ROWS = 512  # images embedded at a time


@torch.no_grad()
def embed(clip: ClipModel, dataset: QuadrupletDataset, batch_size: int = 256, progress: bool = True):
    """`QuadrupletEmbeddings` [N, d] float32 on the CPU of every sample of `dataset`, by the model as it is now."""
    clip.eval()
    loader = DataLoader(dataset, batch_size, collate_fn=collate(clip.tokenizer))
    bar = tqdm(loader, desc="embed held-out samples", disable=not progress)
    batches = [[rows.cpu() for rows in embed_batch(clip, batch)] for batch in bar]
    return QuadrupletEmbeddings(*(torch.cat(rows) for rows in zip(*batches, strict=True)))


def retrieval(rows: QuadrupletEmbeddings, labels: Tensor | None = None) -> dict[str, float]:
    """Cross-modal retrieval over galleries of safe and unsafe items together; row i of all four is sample i.

    Args:
        labels: [N] int64; a safe item is right for a query of the same label. None: each sample is its own label.

    Returns, in [0, 1]:
        unsafe_text_to_unsafe_image_rate: unsafe texts whose best image is any unsafe one (lower is safer).
        unsafe_text_to_safe_image_r1: unsafe texts whose best image is a right safe one.
        unsafe_image_to_unsafe_text_rate, unsafe_image_to_safe_text_r1: the same from image to text.
        safe_text_to_safe_image_r1, safe_image_to_safe_text_r1: among safe items only (usefulness).
    """
    count = len(rows.safe_text)
    labels = torch.arange(count) if labels is None else labels
    images = F.normalize(torch.cat([rows.safe_image, rows.unsafe_image]), dim=-1)
    texts = F.normalize(torch.cat([rows.safe_text, rows.unsafe_text]), dim=-1)

    def best(queries: Tensor, gallery: Tensor) -> tuple[Tensor, Tensor]:
        found = nearest_safe(queries, gallery).indices[:, 0]
        unsafe = found >= count
        return unsafe, ~unsafe & (labels[found % count] == labels)

    unsafe_from_text, right_from_text = best(rows.unsafe_text, images)
    unsafe_from_image, right_from_image = best(rows.unsafe_image, texts)
    return {
        "unsafe_text_to_unsafe_image_rate": _mean(unsafe_from_text),
        "unsafe_text_to_safe_image_r1": _mean(right_from_text),
        "unsafe_image_to_unsafe_text_rate": _mean(unsafe_from_image),
        "unsafe_image_to_safe_text_r1": _mean(right_from_image),
        "safe_text_to_safe_image_r1": _mean(best(rows.safe_text, images[:count])[1]),
        "safe_image_to_safe_text_r1": _mean(best(rows.safe_image, texts[:count])[1]),
    }


def drift(rows: QuadrupletEmbeddings, frozen: QuadrupletEmbeddings) -> dict[str, float]:
    """mean cosine of fine-tuned and frozen embeddings of safe inputs, per modality (1: nothing moved)."""
    return {
        "safe_text_cosine_to_frozen": float(F.cosine_similarity(rows.safe_text, frozen.safe_text).mean()),
        "safe_image_cosine_to_frozen": float(F.cosine_similarity(rows.safe_image, frozen.safe_image).mean()),
    }


@torch.no_grad()
def class_embeddings(clip: ClipModel, names: Sequence[str], prompts: Sequence[str]) -> Tensor:
    """[classes, d] unit rows: the normalised mean of each class's normalised prompt embeddings (CLIP, 2021)."""
    rows = []
    for prompt in prompts:
        tokens = clip.tokenizer([prompt.format(name) for name in names]).to(clip.device)
        rows.append(F.normalize(clip.encode_text(tokens).float(), dim=-1))
    return F.normalize(torch.stack(rows).mean(0), dim=-1).cpu()


@torch.no_grad()
def embed_images(clip: ClipModel, images: Tensor) -> Tensor:
    """[N, d] float32 on the CPU, of preprocessed images [N, 3, H, W]."""
    clip.eval()
    return torch.cat([clip.encode_image(part.to(clip.device)).float().cpu() for part in images.split(_IMAGE_ROWS)])


def zero_shot_accuracy(image: Tensor, labels: Tensor, classes: Tensor) -> float:
    """Share of image embeddings [N, d] whose nearest class row [classes, d] is that of `labels` [N]."""
    return _mean(nearest_safe(image, classes).indices[:, 0] == labels)


def _mean(hits: Tensor) -> float:
    return float(hits.double().mean())
