"""Self-attention whose projections are ordinary linear layers, so that LoRA can reach them.

open_clip uses nn.MultiheadAttention, which reads its weights without calling the layers that own them.
An adapter can then only act by merging into the weight and unmerging after every forward pass; that
rounds the frozen weights a little further away each step (measured: they differ after one step), and it makes the
backward pass compute the gradient of the whole weight. With real linear layers neither happens.
"""

import torch
import torch.nn.functional as F
from open_clip.transformer import ResidualAttentionBlock
from torch import nn


class Attention(nn.Module):
    """Drop-in for a batch-first nn.MultiheadAttention used as self-attention; shares its parameters."""

    def __init__(self, packed: nn.MultiheadAttention, causal: bool) -> None:
        """
        Args:
            packed: the module whose parameters are taken over, not copied.
            causal: the mask it will be given is always the causal one, so the fused causal kernel may be used.
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
        batch, length, width = query.shape
        q, k, v = self.in_proj(query).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        if attn_mask is not None and attn_mask.dim() == 3:
            attn_mask = attn_mask.view(batch, self.heads, length, length)
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=None if self.causal else attn_mask, is_causal=self.causal
        )
        return self.out_proj(out.transpose(1, 2).reshape(batch, length, width)), None


def unpack_attention(model: nn.Module, causal_blocks: nn.Module | None) -> None:
    """Replace every self-attention of open_clip's transformer blocks, in place.

    Args:
        model: an open_clip model.
        causal_blocks: the transformer whose attention mask is always causal, or None.
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
