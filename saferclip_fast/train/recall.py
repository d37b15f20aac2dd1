"""How often a safe text and its image find each other first: what fine-tuning must not lose."""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops.nearest_safe import nearest_safe
from ..runtime.ranks import Ranks


def recall(texts: Tensor, images: Tensor, ranks: Ranks) -> float:
    """recall@1 of text to image and of image to text, their mean, among the pairs of all ranks.

    Args:
        texts, images: [n, d] embeddings of this rank's pairs, on any scale; every rank calls this and gets the same.
    """
    text, image = (torch.nn.functional.normalize(ranks.gather_rows(rows).float(), dim=-1) for rows in (texts, images))
    own = torch.arange(len(text), device=text.device)
    hits = [(nearest_safe(a, b, 1).indices[:, 0] == own).float().mean() for a, b in ((text, image), (image, text))]
    return float(sum(hits) / 2)
