"""Captions cut to the longest of their batch.

Under a causal mask nothing after a caption's end reaches its embedding, so a text tower that reads the embedding at
the end-of-text token gives the same one for the cut tokens, at a fraction of the cost.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

Tokenizer = Callable[[list[str]], torch.Tensor]


def pad_id(tokenizer: Tokenizer) -> int:
    """The id `tokenizer` pads with: 0 for open_clip's own, the wrapped tokenizer's for its HFTokenizer."""
    inner = getattr(tokenizer, "tokenizer", None)
    found = getattr(inner, "pad_token_id", None)
    return 0 if found is None else int(found)


def lengths(tokens: torch.Tensor, pad: int = 0) -> list[int]:
    """Columns of int64 tokens [B, L] that each row needs: all but the padding at its end, and at least one."""
    position = torch.arange(1, tokens.shape[1] + 1, device=tokens.device)
    return ((tokens != pad) * position).amax(dim=1).clamp(min=1).tolist()


def trim(tokens: torch.Tensor, pad: int = 0) -> torch.Tensor:
    """Cut the columns of int64 tokens [B, L] that hold nothing but padding at the end; keeps at least one."""
    return tokens[:, : max(lengths(tokens, pad))].contiguous()
