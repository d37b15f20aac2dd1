"""The steps of a patch: the run's training goes on, with the new pairs in every batch."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from ..config import Config, OptimizerOptions
from ..data import QuadrupletDataset, collate
from ..data.quadruplets import QuadrupletEmbeddings
from ..embeddings import embed_batch
from ..models import ClipModel
from ..models.lora import adaptable_layers
from ..objectives import Objective, ObjectiveOutput
from ..train.device import naming_train_deterministic
from ..train.optim import build_optimizer, check_all_used, learning_rate
from ..train.prepare import build_objective
from ..train.step import forward_backward
from .places import Recipe
from .replay import Replay

HOLDING = ("cos_text", "cos_image", "nce_text", "nce_image", "spread", "neighbors")  # weights of the objective
SHIFT = 1 / 16  # of an image's side: how far an unsafe image of the pairs is moved, at most


class Pairs(NamedTuple):
    """The new pairs, as the frozen model embeds them."""

    data: QuadrupletDataset
    rows: QuadrupletEmbeddings  # [P, d]


def build_loss(config: Config, replay: Replay, redirects_alone: bool = False) -> Objective:
    """The run's own objective over what is replayed; `redirects_alone`: without what holds safe rows, where it can."""
    options = replace(config.objective, k=min(config.objective.k, len(replay.bank)))
    if redirects_alone:
        options = replace(options, weights=replace(options.weights, **dict.fromkeys(HOLDING, 0.0)))
    loss = build_objective(replace(config, objective=options))
    loss.attach(replay.bank)
    return loss


def gradient_loss(clip: ClipModel, loss: Objective, replay: Replay, pairs: Pairs) -> Tensor:
    """The loss of the pairs alone, whose gradient is what they ask of the weights."""
    batch = collate(clip.tokenizer)([pairs.data[row] for row in range(len(pairs.data))])
    rows = torch.arange(len(pairs.data))
    return _loss(loss, embed_batch(clip, batch), batch, replay, pairs, torch.empty(0, dtype=torch.long), rows).loss


def fit(
    clip: ClipModel, loss: Objective, replay: Replay, pairs: Pairs, recipe: Recipe, seed: int, progress: bool
) -> None:
    """Train adapters on `clip`, which has them afterwards.

    Every batch holds pairs and quadruplets of the run, treated alike: safe sides stay near the rows of the frozen model
    that the run started from, and unsafe ones are redirected to the nearest safe rows of the replay, by those rows too.

    Raises FloatingPointError where the loss is not finite, and ValueError for a model without places for adapters.
    """
    torch.manual_seed(seed)  # of the adapters
    clip.add_lora(recipe.rank, recipe.rank, targets=layers_of(clip)).train()
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
    loss: Objective,
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
    labels = (batch[name].to(before.safe_text.device) for name in ("unsafe_text_label", "unsafe_image_label"))
    return loss(current, before, replay.bank, None, *labels)


def layers_of(clip: ClipModel) -> list[str]:
    """The layers that are changed: all of the text encoder's, and the last half of the image encoder's.

    A step's time is that of the image encoder, and no gradient goes back through its first half.
    """
    names = adaptable_layers(clip.model)
    images = [name for name in names if name.startswith("visual.")]
    return images[len(images) // 2 :] + [name for name in names if not name.startswith("visual.")]


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
