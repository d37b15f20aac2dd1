"""Forward and backward pass of one optimizer step, in micro-batches where a whole batch does not fit in memory.

Gradient caching (GradCache, arXiv 2101.06983): the loss L sees a batch only through its embeddings E = f(x), so
dL/dtheta = sum over micro-batches m of (dE_m/dtheta)^T (dL/dE)_m. All rows are embedded without a graph, L and dL/dE
are computed on the whole batch, and each micro-batch is embedded once more, with a graph, to receive its rows of
dL/dE. The random state is replayed, so that dropout is the same both times: the gradient is exact.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from ..data.quadruplets import QuadrupletEmbeddings
from ..embeddings import Encode, embed_batch
from ..models import ClipModel
from ..objectives import ObjectiveOutput
from .profiling import part
from .rng import pack_rng, unpack_rng

Loss = Callable[[QuadrupletEmbeddings], ObjectiveOutput]


def forward_backward(
    clip: ClipModel,
    batch: Mapping[str, Any],
    loss: Loss,
    *,
    micro_batch_size: int = 0,
    precision: str = "fp32",
    scale: Callable[[Tensor], Tensor] = lambda loss: loss,
    encode: Encode | None = None,
    no_sync: Callable[[], AbstractContextManager] = nullcontext,
) -> ObjectiveOutput:
    """Add the gradient of `loss` on a collated batch to the trainable parameters; nothing is read from the device.

    Args:
        clip: the model in training mode.
        batch: B quadruplets as data.Collate makes them, on the CPU; each micro-batch is moved when it is used.
        loss: the objective of the embeddings, four tensors [B, d] float32.
        micro_batch_size: quadruplets in memory at a time; 0 or at least B: all of them, in one pass.
        precision: "fp32", or autocast "bf16" / "fp16", of the encoders.
        scale: applied to the loss before its backward pass (GradScaler.scale).
        encode: what runs `clip` where gradients are wanted, if not itself: a DistributedDataParallel of it.
        no_sync: entered for every micro-batch but the last (DistributedDataParallel.no_sync).

    Returns:
        the objective's output, detached.
    """
    parts = micro_batches(batch, micro_batch_size)
    states: list[dict[str, Tensor]] = []
    with part("embed"):
        if len(parts) == 1:
            whole = embed_batch(clip, batch, precision, encode)
        else:
            whole = QuadrupletEmbeddings(
                *(embeddings.requires_grad_() for embeddings in _embed(clip, parts, precision, states))
            )
    with part("objective"):
        out = loss(whole)
    with part("backward"):
        scale(out.loss).backward()
        out = out._replace(loss=out.loss.detach())
        if len(parts) > 1:
            gradients = [x.grad for x in whole]
            del whole  # and its memory
            _embed_again(clip, parts, precision, encode, no_sync, states, gradients)
    return out


def _embed_again(
    clip: ClipModel,
    parts: Sequence[Mapping[str, Any]],
    precision: str,
    encode: Encode | None,
    no_sync: Callable[[], AbstractContextManager],
    states: Sequence[Mapping[str, Tensor]],
    gradients: Sequence[Tensor | None],
) -> None:
    """Send the `gradients` of the whole batch's embeddings, four times [B, d], back through every micro-batch."""
    first, after = 0, pack_rng(clip.device)
    for i, (micro_batch, state) in enumerate(zip(parts, states, strict=True)):
        unpack_rng(clip.device, state)
        last = first + len(micro_batch["index"])
        with no_sync() if i + 1 < len(parts) else nullcontext():
            embeddings = embed_batch(clip, micro_batch, precision, encode)
            used = [
                (embedding, x[first:last])
                for embedding, x in zip(embeddings, gradients, strict=True)
                if x is not None and embedding.requires_grad  # the image encoder may be frozen (data.text_only)
            ]
            torch.autograd.backward([embedding for embedding, _ in used], [gradient for _, gradient in used])
        first = last
    unpack_rng(clip.device, after)


def embed_micro_batches(
    clip: ClipModel, batch: Mapping[str, Any], micro_batch_size: int, precision: str
) -> QuadrupletEmbeddings:
    """Embeddings [B, d] of a collated batch without a graph, at the memory of one micro-batch."""
    return _embed(clip, micro_batches(batch, micro_batch_size), precision, [])


@torch.no_grad()
def _embed(
    clip: ClipModel, parts: Sequence[Mapping[str, Any]], precision: str, states: list[dict[str, Tensor]]
) -> QuadrupletEmbeddings:
    """Embeddings of all `parts` in order; the random state before each one is appended to `states`."""
    whole: tuple[Tensor, ...] = ()
    first, total = 0, sum(len(micro_batch["index"]) for micro_batch in parts)
    for micro_batch in parts:
        states.append(pack_rng(clip.device))
        embeddings = embed_batch(clip, micro_batch, precision)
        # filled in, not joined at the end: many small tensors would leave holes in memory
        whole = whole or tuple(column.new_empty(total, column.shape[1]) for column in embeddings)
        last = first + len(micro_batch["index"])
        for target, column in zip(whole, embeddings, strict=True):
            target[first:last] = column
        first = last
    return QuadrupletEmbeddings(*whole)


def micro_batches(batch: Mapping[str, Any], size: int) -> list[dict[str, Any]]:
    """A collated batch as consecutive ones of `size` rows (the last may be smaller), each trimmed to its captions."""
    count = len(batch["index"])
    if not 0 < size < count:
        return [dict(batch)]
    parts = [{name: column[i : i + size] for name, column in batch.items()} for i in range(0, count, size)]
    for micro_batch in parts:
        for side in ("safe", "unsafe"):
            tokens = micro_batch[f"{side}_tokens"]
            micro_batch[f"{side}_tokens"] = tokens[:, : max(micro_batch[f"{side}_lengths"])]
    return parts


def check_micro_batches(model: nn.Module, micro_batch_size: int, batch_size: int, ranks: int = 1) -> None:
    """Raises ValueError where parts of a batch would change the result: batch norm being trained mixes its rows."""
    mixing = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.weight.requires_grad]
    if mixing and (0 < micro_batch_size < batch_size or ranks > 1):
        raise ValueError(
            "train.micro_batch_size and several ranks need an encoder without batch norm, whose statistics are those "
            "of the whole batch: use model.tuning=lora, a vision transformer, or one rank and train.micro_batch_size=0"
        )
