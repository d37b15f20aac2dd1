"""Self-attention whose projections are ordinary linear layers, so that LoRA can reach them.

open_clip uses nn.MultiheadAttention, which reads its weights without calling the layers that own them.
An adapter can then only act by merging into the weight and unmerging after every forward pass; that
rounds the frozen weights a little further away each step (measured: they differ after one step), and it makes the
backward pass compute the gradient of the whole weight. With real linear layers neither happens.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from open_clip.transformer import ResidualAttentionBlock
from torch import nn


class Place(NamedTuple):
    """The tokens that embeddings are read from: N cells of [R, L]."""

    columns: torch.Tensor | int  # [N], or the same in every row
    rows: torch.Tensor | None = None  # [N], None: one cell a row, in order

    def of(self, x: torch.Tensor) -> torch.Tensor:
        """x [R, L, ...] -> [N, ...]."""
        if isinstance(self.columns, int):
            return x[:, self.columns]
        rows = torch.arange(len(x), device=x.device) if self.rows is None else self.rows
        return x[rows, self.columns]


class Attention(nn.Module):
    """Drop-in for a batch-first nn.MultiheadAttention used as self-attention; shares its parameters."""

    def __init__(self, packed: nn.MultiheadAttention, causal: bool) -> None:
        """
        Args:
            packed: the module whose parameters are taken over, not copied.
            causal: without a mask a token attends to itself and those before it, by the fused causal kernel.
        """
        super().__init__()
        self.heads = packed.num_heads
        self.causal = causal
        with torch.device("meta"):  # no memory and no random numbers for weights that are replaced at once
            self.in_proj = nn.Linear(packed.embed_dim, 3 * packed.embed_dim)
        self.in_proj.weight = packed.in_proj_weight
        self.in_proj.bias = packed.in_proj_bias
        self.out_proj = packed.out_proj

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        need_weights: bool = False,
        attn_mask: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, None]:
        """query = key = value [B, L, D]; attn_mask additive [L, L] or [B * heads, L, L] -> ([B, L, D], None)."""
        q, k, v = self._heads(query)
        if attn_mask is not None and attn_mask.dim() == 3:
            attn_mask = attn_mask.view(-1, self.heads, *attn_mask.shape[1:])
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask, is_causal=self.causal and attn_mask is None)
        return self.out_proj(out.transpose(1, 2).flatten(2)), None

    def read(self, x: torch.Tensor, attn_mask: torch.Tensor | None, place: Place) -> torch.Tensor:
        """The output of forward at one token a sequence: x [R, L, D], attn_mask [R, 1, L, L] or None -> [N, D]."""
        q, k, v = self._heads(x)
        q = place.of(q.transpose(1, 2)).unsqueeze(2)
        if place.rows is not None:  # index_select: its backward pass adds whole rows
            k, v = k.index_select(0, place.rows), v.index_select(0, place.rows)
        if attn_mask is not None:
            attn_mask = place.of(attn_mask.transpose(1, 2)).unsqueeze(2)
        elif self.causal:
            columns = torch.as_tensor(place.columns, device=x.device).expand(len(q))
            attn_mask = (torch.arange(x.shape[1], device=x.device) <= columns[:, None])[:, None, None]
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask)
        return self.out_proj(out.flatten(1))

    def _heads(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries, keys and values [B, heads, L, D / heads] of x [B, L, D]."""
        q, k, v = self.in_proj(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return q, k, v


def unpack_attention(model: nn.Module, causal_blocks: nn.Module | None) -> None:
    """Replace every self-attention of open_clip's transformer blocks, in place.

    Args:
        model: an open_clip model.
        causal_blocks: the transformer whose attention is always causal, or None.
    """
    causal = set(causal_blocks.modules()) if causal_blocks is not None else set()
    for block in model.modules():
        is_self_attention = isinstance(block, ResidualAttentionBlock) and not hasattr(block, "ln_1_kv")
        if is_self_attention and type(block.attn) is nn.MultiheadAttention:
            block.attn = Attention(block.attn, causal=block in causal)


def packed_names(model: nn.Module) -> dict[str, str]:
    """Parameter names as they are now -> as open_clip's checkpoints spell them (only those that differ)."""
    return {
        f"{name}.in_proj.{kind}": f"{name}.in_proj_{kind}"
        for name, module in model.named_modules()
        if isinstance(module, Attention)
        for kind in ("weight", "bias")
    }
