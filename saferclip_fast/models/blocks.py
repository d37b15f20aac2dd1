"""open_clip's transformer blocks without the work that no embedding depends on."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from open_clip.transformer import QuickGELU, ResidualAttentionBlock, VisionTransformer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .attention import Place

CLASS_TOKEN = Place(0)  # of an image


class LastBlock(nn.Module):
    """A tower's last block, computed for the one token of each sequence that the embedding is read from.

    Its keys and values need every token; its output projection and MLP, three quarters of a block's arithmetic, do not.
    Shares the parameters of the block that it replaces.
    """

    def __init__(self, block: ResidualAttentionBlock) -> None:
        super().__init__()
        self.ln_1, self.attn, self.ls_1 = block.ln_1, block.attn, block.ls_1
        self.ln_2, self.mlp, self.ls_2 = block.ln_2, block.mlp, block.ls_2
        self.get_weight_dtype = block.get_weight_dtype

    def forward(
        self, x: Tensor, k_x: None = None, v_x: None = None, attn_mask: Tensor | None = None, place: Place = CLASS_TOKEN
    ) -> Tensor:
        """x [R, L, D] -> [N, 1, D], the tokens at `place`."""
        out = place.of(x) + self.ls_1(self.attn.read(self.ln_1(x), attn_mask, place))
        return (out + self.ls_2(self.mlp(self.ln_2(out)))).unsqueeze(1)


class LeanQuickGELU(QuickGELU):
    """x sigmoid(1.702 x) as silu(1.702 x) / 1.702, which keeps one tensor for the backward pass instead of two."""

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(x * 1.702) / 1.702


def trim_blocks(model: nn.Module, text_transformer: Any) -> None:
    """Put LastBlock and LeanQuickGELU where they compute the same, in place; after attention.unpack_attention.

    Args:
        model: an open_clip model.
        text_transformer: the text encoder's transformer if one token of each caption is read from it, or None.
    """
    modules: list[Any] = list(model.modules())
    for module in modules:
        if isinstance(module, ResidualAttentionBlock) and type(module.mlp.gelu) is QuickGELU:
            module.mlp.gelu = LeanQuickGELU()
    vision: Any = getattr(model, "visual", None)
    reads_class_token = isinstance(vision, VisionTransformer) and (
        vision.pool_type,
        vision.attn_pool,
        vision.output_tokens,
    ) == ("tok", None, False)
    for transformer in (vision.transformer if reads_class_token else None, text_transformer):
        if transformer is not None and type(transformer.resblocks[-1]) is ResidualAttentionBlock:
            transformer.resblocks[-1] = LastBlock(transformer.resblocks[-1])


def run_transformer(transformer: Any, x: Tensor, attn_mask: Tensor | None, place: Place) -> Tensor:
    """open_clip's Transformer.forward, read at `place`: x [R, L, D] -> [N, D]."""
    for block in transformer.resblocks[:-1]:
        if transformer.grad_checkpointing:
            x = checkpoint(block, x, None, None, attn_mask, use_reentrant=False)
        else:
            x = block(x, attn_mask=attn_mask)
    last = transformer.resblocks[-1]
    if isinstance(last, LastBlock):
        return last(x, attn_mask=attn_mask, place=place).squeeze(1)
    return place.of(last(x, attn_mask=attn_mask))
