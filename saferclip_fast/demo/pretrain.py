"""Pre-trains a small CLIP from scratch in a minute or two, for the demo and the benchmarks.

This is plain CLIP training (symmetric InfoNCE), only as good as a small data set allows; users bring a real CLIP.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import math
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from ..data.captions import trim
from ..models import ClipModel, load_clip
from ..storage.files import save_tensors

Pairs = Callable[[], tuple[np.ndarray, list[str]]]

# Measured on scenes (docs/method.md, "The demo's model"): smaller batches learn shapes in fewer samples.
BATCH = 128
PEAK_LR = 2e-3
WARMUP_STEPS = 50
MAX_LOGIT_SCALE = 100.0


def pretrained_clip(
    model: str, name: str, pairs: Pairs, epochs: int, cache_dir: str | Path, seed: int = 0, progress: bool = True
) -> Path:
    """The weights file of a small CLIP trained on `pairs()`, made on the first call and kept in `cache_dir`.

    Args:
        model: an open_clip model name.
        name: what the pairs are; part of the file name, with a hash of everything that the weights depend on.
        pairs: returns uint8 images [N, H, W, 3] and their N captions; called only where nothing is cached.
        epochs: passes over the pairs.
    """
    settings = [model, name, epochs, seed, BATCH, PEAK_LR, WARMUP_STEPS, torch.__version__]
    key = hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:12]
    path = Path(cache_dir) / f"{model}-{name}-{key}.safetensors"
    if not path.is_file():
        torch.manual_seed(seed)
        with _quiet():
            clip = load_clip(model)
        images, captions = pairs()
        train_on_pairs(clip, images, captions, epochs, progress=progress)
        save_tensors(path, clip.exported_state_dict(), {"format": "pt"})
    return path


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Random weights are what is wanted here: no warning of them from this package or open_clip."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(logging.NOTSET)


def preprocess(clip: ClipModel, images: np.ndarray) -> Tensor:
    """uint8 [N, H, W, 3] -> float32 [N, 3, H', W'] as the model's own preprocessing makes them."""
    mean, std = (torch.tensor(clip.preprocessing[name]).view(3, 1, 1) for name in ("mean", "std"))
    normalized = torch.from_numpy(images).movedim(-1, 1).div(255).sub_(mean).div_(std)
    if torch.equal(normalized[0], clip.preprocess(Image.fromarray(images[0]))):  # the size is right: no image by image
        return normalized
    return torch.stack([clip.preprocess(Image.fromarray(image)) for image in images])


def train_on_pairs(
    clip: ClipModel,
    images: np.ndarray,
    captions: list[str],
    epochs: int,
    peak_lr: float = PEAK_LR,
    progress: bool = True,
) -> None:
    """Trains every weight of `clip` by symmetric InfoNCE on uint8 images [N, H, W, 3] and their N captions."""
    pixels, tokens = preprocess(clip, images), trim(clip.tokenizer(captions), clip.pad_id)
    # channels last: a step of RN-small-32 takes 0.82 of the time on AMD EPYC
    model = clip.model.train().requires_grad_(True).to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak_lr, betas=(0.9, 0.98), weight_decay=0.05, fused=True)
    per_epoch = len(pixels) // BATCH
    total = epochs * per_epoch
    bar = tqdm(total=total, desc=f"pre-train {clip.name}", unit="step", disable=not progress)
    step = 0
    for _ in range(epochs):
        for rows in torch.randperm(len(pixels))[: per_epoch * BATCH].view(-1, BATCH):
            decay = 0.5 * (1 + math.cos(math.pi * step / total))
            for group in optimizer.param_groups:
                group["lr"] = peak_lr * min(1.0, (step + 1) / WARMUP_STEPS) * decay
            image, text = clip(pixels[rows], tokens[rows])
            scale = model.logit_scale.exp().clamp(max=MAX_LOGIT_SCALE)
            logits = scale * F.normalize(image, dim=-1) @ F.normalize(text, dim=-1).T
            target = torch.arange(len(rows))
            loss = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            step += 1
            bar.update()
            if step % 10 == 0:
                bar.set_postfix(loss=f"{loss.item():.3f}")
    bar.close()
    model.eval().requires_grad_(False)
