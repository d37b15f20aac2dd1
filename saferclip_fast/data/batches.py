"""Samples to a batch: images stacked, captions tokenized and trimmed to the longest of the batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from .captions import Tokenizer, lengths, pad_id
from .captions import trim as trim_tokens


class Collate:
    """A collate_fn for QuadrupletDataset.

    The batch is a dict: index [B] int64; safe_image, unsafe_image [B, 3, H, W] float32; safe_tokens,
    unsafe_tokens [B, L] int64, each trimmed to its longest caption; safe_lengths, unsafe_lengths, the captions'
    lengths as a list of B ints, so that nobody has to read tokens back from a device; unsafe_text_label,
    unsafe_image_label [B], int64, or float32 where one lies between 0 and 1. A caption longer than the tokenizer's
    context is cut there by the tokenizer.
    A batch of text-only samples has no unsafe_image; the safe one's embedding stands in.
    `trim=False` keeps the full context: needed for text towers that read the padding (SigLIP).
    """

    def __init__(self, tokenizer: Tokenizer, trim: bool = True):
        self.tokenizer = tokenizer
        self.trim = trim
        self.pad = pad_id(tokenizer)

    def tokens(self, texts: Sequence[str]) -> torch.Tensor:
        """int64 [B, L] tokens of `texts`, trimmed."""
        tokens = self.tokenizer(list(texts))
        return trim_tokens(tokens, self.pad) if self.trim else tokens

    def __call__(self, samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        batch: dict[str, Any] = {}
        alone = all(sample["unsafe_image"] is sample["safe_image"] for sample in samples)  # text-only
        for side in ("safe", "unsafe"):
            if side == "safe" or not alone:
                batch[f"{side}_image"] = torch.stack([sample[f"{side}_image"] for sample in samples])
            tokens = self.tokens([sample[f"{side}_text"] for sample in samples])
            batch[f"{side}_tokens"] = tokens
            batch[f"{side}_lengths"] = lengths(tokens, self.pad) if self.trim else [tokens.shape[1]] * len(tokens)
        for name in ("index", "unsafe_text_label", "unsafe_image_label"):
            batch[name] = torch.tensor([sample[name] for sample in samples])
        return batch


def collate(tokenizer: Tokenizer, trim: bool = True) -> Collate:
    """The collate_fn that makes batches of QuadrupletDataset items for `tokenizer` (see Collate)."""
    return Collate(tokenizer, trim)
