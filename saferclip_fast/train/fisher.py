"""Where adapters start: in the directions that unsafe samples' gradients are large in, and safe samples' small.

After PAIRed Erasing (arXiv 2602.05339), whose formula was not found: this one is ours. The start changes nothing, as
models/lora.py says.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from ..config import ConfigError
from ..data.quadruplets import QuadrupletEmbeddings
from ..embeddings import embed_batch
from ..models import ClipModel
from ..models.lora import lora_layers, set_start, start_tensors
from ..objectives import ObjectiveOutput
from ..runtime.ranks import Ranks
from .device import naming_train_deterministic
from .prepare import Split
from .state import RunState

SAMPLES = 256

Loss = Callable[[QuadrupletEmbeddings, dict[str, Any], Split], ObjectiveOutput]
Loader = Callable[[Split, list[list[int]]], DataLoader]


def start_adapters(run: RunState, split: Split, loader: Loader, loss: Loss) -> None:
    """Give the adapters their start before the first step, if lora.init=fisher asks for it; the same on every rank.

    With F_u and F_s the means, over 256 training samples, of the squared gradients of each element of a weight W, of
    what the objective asks of unsafe rows and of safe ones,

        M = W sqrt(F_u / (F_s + mean F_s)), scaled to the length of W           s B0 A0 = its best rank-r approximation

    Which samples follows from the seed; random numbers are not drawn. Needs room for F_u, F_s and a gradient of every
    adapted weight, and takes three passes' time for each sample. Batch norm is as in evaluation.

    Args:
        run: at step 0, its adapters as add_lora left them.
        split, loader, loss: of the training samples, as Trainer has them.

    Raises ConfigError where no sample asks for redirection, and for adapters without a start.
    """
    if run.config.lora.init != "fisher":
        return
    clip, ranks, progress = run.clip, run.ranks, run.config.log.progress and run.ranks.first
    if not start_tensors(clip.model):
        raise ConfigError(
            "lora.init=fisher: these adapters have no start to set, make them by add_lora(..., start=True)"
        )
    count = len(split.samples)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(run.config.seed))
    chosen = order[:SAMPLES].sort().values.tolist()
    mine = ranks.split(len(chosen))
    batches = list(loader(split, [[index] for index in chosen[mine.start : mine.stop]]))
    training = clip.training
    clip.eval()
    with naming_train_deterministic():
        unsafe, safe = wanted_gradients(batches, split, loss, clip.device, ranks)
        bar = tqdm(batches, desc="Fisher information", disable=not progress)
        fisher = squared_gradients(clip, bar, unsafe[mine.start : mine.stop], safe[mine.start : mine.stop])
    clip.train(training)
    layers, found = lora_layers(clip.model), False
    for name, (of_unsafe, of_safe) in fisher.items():
        of_unsafe, of_safe = ranks.sum(of_unsafe), ranks.sum(of_safe)
        weight = layers[name].get_base_layer().weight.detach()
        found |= bool(of_unsafe.any())
        if of_unsafe.any():
            set_start(layers[name], important(weight, of_unsafe, of_safe))
    if not found:
        raise ConfigError(
            "lora.init=fisher: the objective asks nothing of the unsafe rows it was shown, so no direction matters for "
            "them: check data.train's labels and objective.weights, or take lora.init=zero"
        )
    for tensor in start_tensors(clip.model).values():  # the first rank's, should another round otherwise
        tensor.copy_(ranks.sum(tensor if ranks.first else torch.zeros_like(tensor)))


def wanted_gradients(
    batches: Sequence[Mapping[str, Any]], split: Split, loss: Loss, device: torch.device, ranks: Ranks
) -> tuple[Tensor, Tensor]:
    """Gradients of the objective of all samples, by their embeddings at the start, which are the frozen ones.

    Args:
        batches: this rank's samples, one a batch.

    Returns:
        Two tensors [samples of all ranks, 4, d], columns as in QuadrupletEmbeddings: of rows that are unsafe, and of
        rows that are safe. Each is 0 where the other is not.
    """
    names = "index", "unsafe_text_label", "unsafe_image_label"
    batch: dict[str, Any] = {
        name: ranks.gather_rows(torch.tensor([float(batch[name]) for batch in batches], dtype=torch.float64))
        for name in names
    }
    batch = {name: column.long() if name == "index" else column.float() for name, column in batch.items()}
    frozen = split.frozen_of(batch["index"], device)
    current = QuadrupletEmbeddings(*(column.clone().requires_grad_() for column in frozen))
    loss(current, batch, split).loss.backward()
    rows = torch.stack([torch.zeros_like(x) if x.grad is None else x.grad for x in current], 1)
    labels = torch.stack([batch[name] for name in names[1:]], 1).to(device)
    unsafe = torch.cat([torch.zeros_like(labels), (labels > 0.5).to(labels)], 1)[..., None]  # by column of a quadruplet
    return rows * unsafe, rows * (1 - unsafe)


def squared_gradients(
    clip: ClipModel, batches: Iterable[Mapping[str, Any]], unsafe: Tensor, safe: Tensor
) -> dict[str, tuple[Tensor, Tensor]]:
    """Sums over samples of (dE/dW . gradient of E)^2, by adapted layer: for `unsafe` and for `safe` [samples, 4, d].

    A weight's gradient is that of one sample alone, so one sample goes through the encoders at a time.
    """
    layers = lora_layers(clip.model)
    names = dict.fromkeys(key.rpartition(".")[0] for key in start_tensors(clip.model))
    weights = {name: layers[name].get_base_layer().weight for name in names}
    sums = {name: (torch.zeros_like(weight), torch.zeros_like(weight)) for name, weight in weights.items()}
    for weight in weights.values():
        weight.requires_grad_(True)
    try:
        for number, batch in enumerate(batches):
            # not through torch.compile or the exchange of gradients
            columns = torch.stack(embed_batch(clip, batch, "fp32", clip.forward)).squeeze(1)
            for part, wanted in enumerate((unsafe[number], safe[number])):
                found = torch.autograd.grad(
                    columns, [*weights.values()], wanted.to(columns), retain_graph=part == 0, allow_unused=True
                )
                for name, gradient in zip(weights, found, strict=True):
                    if gradient is not None:
                        sums[name][part].addcmul_(gradient, gradient)
    finally:
        for weight in weights.values():
            weight.requires_grad_(False)
    return sums


def important(weight: Tensor, unsafe: Tensor, safe: Tensor) -> Tensor:
    """M = W sqrt(F_u / (F_s + mean F_s)), scaled to the length of W; all [out, ...]; F_u is not 0.

    The mean keeps elements that no safe sample uses from outweighing all others; W's length gives the start's size.
    """
    floor = safe.mean()
    found = weight * (unsafe / (safe + torch.where(floor > 0, floor, 1.0))).sqrt()
    length = found.norm()
    return found * (weight.norm() / length) if length > 0 else found
