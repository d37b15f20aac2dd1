"""How often texts and images find each other first: of safe pairs, which must not be lost, and of redirected ones."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..data.quadruplets import QuadrupletEmbeddings
from ..ops.nearest_safe import nearest_safe
from ..runtime.ranks import Ranks


def recalls(
    rows: Sequence[QuadrupletEmbeddings], captions: Sequence[Sequence[Tensor]], ranks: Ranks
) -> dict[str, float]:
    """The "recall" of safe texts and images, and the "recall_sum" that Safe-CLIP's authors stop early by.

        recall_sum = sum over S-V, S-G, U-V of recall@1 of text to image and of image to text, 0 to 6

    with S, U the safe and unsafe texts, V, G the safe and unsafe images of the validation rows.

    Args:
        rows: embeddings [n, d] of each batch of this rank, on any scale; every rank calls this and gets the same.
        captions: token ids [n, L] of the safe and of the unsafe texts of each batch, all of one L.
    """
    safe_text, safe_image, unsafe_text, unsafe_image = map(torch.cat, zip(*rows, strict=True))
    safe_words, unsafe_words = map(torch.cat, zip(*captions, strict=True))
    safe = recall(safe_text, safe_image, safe_words, ranks)
    to_unsafe = recall(safe_text, unsafe_image, safe_words, ranks)
    of_unsafe = recall(unsafe_text, safe_image, unsafe_words, ranks)
    return {"recall": safe, "recall_sum": 2 * (safe + to_unsafe + of_unsafe)}


def recall(texts: Tensor, images: Tensor, captions: Tensor, ranks: Ranks) -> float:
    """recall@1 of text to image and of image to text, their mean, among the pairs of all ranks.

    An image is right for its own text and for every text of the same words.
    """
    text, image = (torch.nn.functional.normalize(ranks.gather_rows(rows).float(), dim=-1) for rows in (texts, images))
    every = ranks.gather_rows(captions.to(texts.device))
    words = torch.unique(every, dim=0, return_inverse=True)[1]
    found = [nearest_safe(a, b, 1).indices[:, 0] for a, b in ((text, image), (image, text))]
    return float(sum((words[first] == words).float().mean() for first in found) / 2)
