"""How often texts and images find each other first: of safe pairs, which must not be lost, and of redirected ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..data.quadruplets import QuadrupletEmbeddings
from ..models import ClipModel
from ..ops.nearest_safe import nearest_safe
from ..runtime.ranks import Ranks


def captions_of(batch: Mapping[str, Any], clip: ClipModel) -> tuple[Tensor, Tensor]:
    """Token ids [n, L] of a batch's safe and unsafe texts, padded to the context length L again."""
    safe, unsafe = (batch[f"{side}_tokens"] for side in ("safe", "unsafe"))
    short = [clip.context_length - tokens.shape[1] for tokens in (safe, unsafe)]
    pad = torch.nn.functional.pad
    return pad(safe, (0, short[0]), value=clip.pad_id), pad(unsafe, (0, short[1]), value=clip.pad_id)


def recalls_of(
    rows: Sequence[QuadrupletEmbeddings], captions: Sequence[tuple[Tensor, Tensor]], ranks: Ranks
) -> dict[str, float]:
    """`recalls` of a whole validation set, from its batches."""
    every = QuadrupletEmbeddings(*map(torch.cat, zip(*rows, strict=True)))
    safe, unsafe = map(torch.cat, zip(*captions, strict=True))
    return recalls(every, safe, unsafe, ranks)


def recalls(
    rows: QuadrupletEmbeddings, safe_captions: Tensor, unsafe_captions: Tensor, ranks: Ranks
) -> dict[str, float]:
    """ "recall" of safe texts and images, and "recall_sum", what Safe-CLIP's authors stop early by.

        recall_sum = sum over S-V, S-G, U-V of recall@1 of text to image and of image to text, 0 to 6

    with S, U the safe and unsafe texts, V, G the safe and unsafe images of the validation rows.

    Args:
        rows: embeddings [n, d] of this rank's quadruplets, on any scale; every rank calls this and gets the same.
        safe_captions, unsafe_captions: their token ids [n, L].
    """
    safe = recall(rows.safe_text, rows.safe_image, safe_captions, ranks)
    to_unsafe = recall(rows.safe_text, rows.unsafe_image, safe_captions, ranks)
    of_unsafe = recall(rows.unsafe_text, rows.safe_image, unsafe_captions, ranks)
    return {"recall": safe, "recall_sum": 2 * (safe + to_unsafe + of_unsafe)}


def recall(texts: Tensor, images: Tensor, captions: Tensor, ranks: Ranks) -> float:
    """recall@1 of text to image and of image to text, their mean, among the pairs of all ranks.

    An image is right for its own text and for every text of the same words.
    """
    text, image = (torch.nn.functional.normalize(ranks.gather_rows(rows).float(), dim=-1) for rows in (texts, images))
    every = ranks.gather_rows(captions.to(texts.device))
    words = torch.unique(every, dim=0, return_inverse=True)[1]
    hits = [
        (words[nearest_safe(a, b, 1).indices[:, 0]] == words).float().mean() for a, b in ((text, image), (image, text))
    ]
    return float(sum(hits) / 2)
