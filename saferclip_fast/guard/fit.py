"""Fitting a head: binary cross-entropy on frozen embeddings, stopped, chosen and calibrated on validation rows."""

from __future__ import annotations

import copy
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from ..data.quadruplets import QuadrupletEmbeddings
from .figures import auroc
from .model import Head

HIDDEN = 64
# Chosen on validation scenes and photographs among rates 0.003, 0.01 and 0.03.
RATE, WEIGHT_DECAY, BATCH, EPOCHS = 1e-2, 1e-2, 128, 200
PATIENCE, LEAST = 10, 1e-4  # epochs without so much less loss (nats) end the fit


class Items(NamedTuple):
    """Texts, or images, of quadruplets."""

    embeddings: Tensor  # [n, d]
    unsafe: Tensor  # bool [n]

    @classmethod
    def of(cls, modality: str, embeddings: QuadrupletEmbeddings, label: Tensor) -> Items:
        """Both sides of N rows, safe ones first; label [N]: 0 where this modality of the unsafe side is safe."""
        sides = [getattr(embeddings, f"{side}_{modality}").float() for side in ("safe", "unsafe")]
        return cls(torch.cat(sides), torch.cat([torch.zeros(len(label), dtype=torch.bool), label.bool()]))


class Fitted(NamedTuple):
    """A calibrated head, and the area under the ROC curve of every head that was tried, on validation items."""

    head: Head
    tried: dict[int, float]  # hidden units -> area


def fit_head(modality: str, train: Items, validation: Items, seed: int, progress: bool = True) -> Fitted:
    """A logistic regression, or a head with a hidden layer where that is better for certain.

    Both are fitted to `train` by binary cross-entropy. The larger one is taken only where its area under the ROC curve
    on `validation` is larger by an interval (95 %, paired bootstrap) that lies above 0.

    Args:
        modality: "text" or "image".
        train, validation: safe and unsafe items, both kinds in each, on one device.
        seed: of the first weights, the order of the items and the bootstrap.
        progress: show a bar.
    """
    heads = {hidden: _trained(modality, train, validation, hidden, seed, progress) for hidden in (0, HIDDEN)}
    with torch.no_grad():
        found = {hidden: auroc(head.score(validation.embeddings), validation.unsafe) for hidden, head in heads.items()}
    better = (found[HIDDEN] - found[0]).interval()["low"] > 0
    head = heads[HIDDEN if better else 0]
    _calibrate(head, validation)
    return Fitted(head.requires_grad_(False).eval(), {hidden: area.value for hidden, area in found.items()})


def _trained(modality: str, train: Items, validation: Items, hidden: int, seed: int, progress: bool) -> Head:
    """Its weights after the epoch of the least validation loss."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        head = Head(modality, train.embeddings.shape[1], hidden)
    unit = F.normalize(train.embeddings, dim=-1)
    head.mean, head.std = unit.mean(0), unit.std(0).clamp_min(1e-6)
    head.to(train.embeddings.device)
    optimizer = torch.optim.AdamW(head.parameters(), lr=RATE, weight_decay=WEIGHT_DECAY)
    order = torch.Generator().manual_seed(seed)
    best, least, waited = copy.deepcopy(head.state_dict()), float("inf"), 0
    for _ in tqdm(range(EPOCHS), f"fit {modality} guard, {hidden} hidden", disable=not progress, leave=False):
        for rows in torch.randperm(len(train.unsafe), generator=order).split(BATCH):
            optimizer.zero_grad(set_to_none=True)
            _loss(head, Items(train.embeddings[rows], train.unsafe[rows])).backward()
            optimizer.step()
        with torch.no_grad():
            loss = float(_loss(head, validation))
        waited += 1
        if loss < least - LEAST:
            best, least, waited = copy.deepcopy(head.state_dict()), loss, 0
        if waited == PATIENCE:
            break
    head.load_state_dict(best)
    return head


def _loss(head: Head, items: Items) -> Tensor:
    return F.binary_cross_entropy_with_logits(head.score(items.embeddings), items.unsafe.float())


def _calibrate(head: Head, items: Items) -> None:
    """Scale and shift of the log-odds by the likelihood of `items` (Platt, 1999).

    His targets, (n1 + 1) / (n1 + 2) for n1 unsafe items and 1 / (n0 + 2) for n0 safe ones, keep the scale finite where
    the two kinds are apart.
    """
    with torch.no_grad():
        score = head.score(items.embeddings).double()
    unsafe = int(items.unsafe.sum())
    safe = len(items.unsafe) - unsafe
    target = torch.where(items.unsafe, (unsafe + 1) / (unsafe + 2), 1 / (safe + 2)).double()
    log_scale, shift = (torch.zeros((), dtype=torch.float64, device=score.device, requires_grad=True) for _ in "ab")
    optimizer = torch.optim.LBFGS([log_scale, shift], max_iter=100, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        found = F.binary_cross_entropy_with_logits(log_scale.exp() * score + shift, target)
        found.backward()
        return found

    optimizer.step(loss)
    head.calibration.copy_(torch.stack([log_scale.exp(), shift]).detach())
