"""The steps of a patch: the pairs are redirected, and what is replayed is held where it is."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from ..config import ObjectiveOptions, OptimizerOptions
from ..data import QuadrupletDataset, collate
from ..data.quadruplets import QuadrupletEmbeddings
from ..embeddings import embed_batch
from ..models import ClipModel
from ..objectives import ObjectiveOutput, SaferClip
from ..train.device import naming_train_deterministic
from ..train.optim import build_optimizer, check_all_used, learning_rate
from ..train.step import forward_backward
from .places import Recipe
from .replay import Replay

SHIFT = 1 / 16  # of an image's side: how far an unsafe image of the pairs is moved, at most


class Pairs(NamedTuple):
    """The new pairs, as the model that is patched embeds them."""

    data: QuadrupletDataset
    rows: QuadrupletEmbeddings  # [P, d]


def build_loss(options: ObjectiveOptions, replay: Replay, **weights: float) -> SaferClip:
    """The objective of a patch: SafeR-CLIP with the default weights, or those given, and the rank guard's limits."""
    loss = SaferClip(
        weights,
        k=min(options.k, len(replay.bank)),
        tau=options.tau,
        beta=options.beta,
        margin=options.margin,
        page=options.page,
        guard_k=options.guard_k,
        guard_margin=options.guard_margin,
        backend=options.backend,
    )
    loss.attach(replay.bank)
    return loss


def gradient_loss(clip: ClipModel, loss: SaferClip, replay: Replay, pairs: Pairs) -> Tensor:
    """The loss of the pairs alone, whose gradient is what they ask of the weights."""
    batch = collate(clip.tokenizer)([pairs.data[row] for row in range(len(pairs.data))])
    rows = torch.arange(len(pairs.data))
    return _loss(loss, embed_batch(clip, batch), batch, replay, pairs, torch.empty(0, dtype=torch.long), rows).loss


def fit(
    clip: ClipModel, loss: SaferClip, replay: Replay, pairs: Pairs, recipe: Recipe, seed: int, progress: bool
) -> None:
    """Train adapters on `clip`, which has them afterwards.

    Every batch holds pairs, whose unsafe side is redirected and guarded, and quadruplets of the run, both sides of
    which are held at the rows that the model had before (label 0: docs/method.md, "Labels").

    Raises FloatingPointError where the loss is not finite, and ValueError for a model without places for adapters.
    """
    torch.manual_seed(seed)  # of the adapters
    clip.add_lora(recipe.rank, recipe.rank).train()
    trained = {name: p for name, p in clip.model.named_parameters() if p.requires_grad}
    options = OptimizerOptions(lr=recipe.lr, schedule="cosine", warmup_steps=recipe.warmup)
    optimizer = build_optimizer(options, trained)
    generator = torch.Generator().manual_seed(seed)
    old = _batches(len(replay.data), recipe.replayed, generator)
    new = _batches(len(pairs.data), recipe.shown, generator)
    join = collate(clip.tokenizer)
    bar = tqdm(range(recipe.steps), desc="patch", disable=not progress)
    for step in bar:
        of_old, of_new = next(old), next(new)
        items = [replay.data[row] for row in of_old.tolist()] + [pairs.data[row] for row in of_new.tolist()]
        batch = join(items)
        moved(batch["unsafe_image"][len(of_old) :], generator)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(options, step, recipe.steps)

        def loss_of(current: QuadrupletEmbeddings, batch=batch, of_old=of_old, of_new=of_new) -> ObjectiveOutput:
            return _loss(loss, current, batch, replay, pairs, of_old, of_new)

        with naming_train_deterministic():
            out = forward_backward(clip, batch, loss_of)
        if step == 0:
            check_all_used(trained)
        if not math.isfinite(value := float(out.loss)):
            raise FloatingPointError(f"the loss is {value} in step {step + 1} of the patch: try a smaller --lr")
        nn.utils.clip_grad_norm_(trained.values(), options.clip_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        bar.set_postfix(loss=f"{value:.2f}", refresh=False)
    clip.eval()


def _loss(
    loss: SaferClip,
    current: QuadrupletEmbeddings,
    batch: dict[str, Any],
    replay: Replay,
    pairs: Pairs,
    of_old: Tensor,
    of_new: Tensor,
) -> ObjectiveOutput:
    """The objective of a batch whose first rows are `of_old` of the replay, and the others `of_new` of the pairs."""
    before = QuadrupletEmbeddings(
        *(torch.cat([old[of_old], new[of_new]]) for old, new in zip(replay.rows, pairs.rows, strict=True))
    )
    labels = []
    for name in ("unsafe_text_label", "unsafe_image_label"):
        label = batch[name].float()
        label[: len(of_old)] = 0
        labels.append(label.to(before.safe_text.device))
    neighbors = replay.bank.nearest(before.unsafe_text, loss.k, backend=loss.backend, check=False)
    return loss(current, before, replay.bank, neighbors, *labels)


def _batches(count: int, size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """int64 [min(size, count)]: rows in random order, no row twice in a batch, all of them before any comes again."""
    size = min(size, count)
    while True:
        order = torch.randperm(count, generator=generator)
        yield from (part for part in order.split(size) if len(part) == size)


def moved(images: Tensor, generator: torch.Generator) -> None:
    """Mirrors and shifts images [B, 3, H, W] at random, in place, the edges repeated: few pairs are seen as more."""
    far = max(1, round(images.shape[-1] * SHIFT))
    for row in range(len(images)):
        mirrored, down, right = (int(torch.randint(n, (), generator=generator)) for n in (2, 2 * far + 1, 2 * far + 1))
        image = images[row].flip(-1) if mirrored else images[row]
        padded = F.pad(image[None], (far,) * 4, mode="replicate")[0]
        images[row] = padded[:, down : down + image.shape[1], right : right + image.shape[2]]
