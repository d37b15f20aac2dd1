"""Captions cut to the longest of their batch, and text towers run at that length."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

Tokenizer = Callable[[list[str]], torch.Tensor]


def pad_id(tokenizer: Tokenizer) -> int:
    """The id `tokenizer` pads with: 0 for open_clip's own, the wrapped tokenizer's for its HFTokenizer."""
    inner = getattr(tokenizer, "tokenizer", None)
    found = getattr(inner, "pad_token_id", None)
    return 0 if found is None else int(found)


def trim(tokens: torch.Tensor, pad: int = 0) -> torch.Tensor:
    """Cut the columns of int64 tokens [B, L] that hold nothing but padding at the end; keeps at least one."""
    used = (tokens != pad).any(dim=0).nonzero()
    length = int(used[-1]) + 1 if len(used) else 1
    return tokens[:, :length].contiguous()


class _EncodeText(nn.Module):
    """Gives functional_call a forward that is the model's encode_text."""

    def __init__(self, model: Any):
        super().__init__()
        self.model = model

    def forward(self, tokens: torch.Tensor, **options: Any) -> torch.Tensor:
        return self.model.encode_text(tokens, **options)


def encode_text(model: Any, tokens: torch.Tensor, **options: Any) -> torch.Tensor:
    """`model.encode_text(tokens, **options)` for trimmed tokens [B, L], L <= context length -> [B, d].

    open_clip 3.3 adds its whole positional embedding and causal mask, and so fails on short input; here both
    are cut to L for the call. Under a causal mask nothing after a caption's end reaches its embedding, so the
    result equals that of the padded tokens. Differentiable; works on models wrapped by peft.

    Raises ValueError for text towers whose embedding depends on the padding (no causal mask, or pooling the
    last position): pass them untrimmed tokens, collate(tokenizer, trim=False).
    """
    length = tokens.shape[1]
    replaced = {}
    for name, module in model.named_modules():
        position = getattr(module, "positional_embedding", None)
        if not hasattr(module, "token_embedding") or position is None or position.shape[0] <= length:
            continue
        mask = getattr(module, "attn_mask", None)
        pooling = getattr(module, "text_pool_type", getattr(module, "pool_type", None))
        if mask is None or pooling == "last" or getattr(module, "cls_emb", None) is not None:
            raise ValueError(
                f"this text tower (pooling {pooling!r}) reads the padding, so its tokens must have the full "
                f"{position.shape[0]} columns, not {length}: use collate(tokenizer, trim=False)"
            )
        prefix = f"model.{name}." if name else "model."
        replaced[prefix + "positional_embedding"] = position[:length]
        replaced[prefix + "attn_mask"] = mask[:length, :length]
    if not replaced:
        return model.encode_text(tokens, **options)
    return torch.func.functional_call(_EncodeText(model), replaced, (tokens,), options)
