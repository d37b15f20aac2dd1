"""Several captions in one row of tokens, so that next to no padding goes through the text encoder.

A caption's tokens attend to each other alone, with positions counted from its own start, so it gets the embedding
that it has in a row of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class PackedCaptions(NamedTuple):
    """N captions in R rows of L tokens, all int64."""

    tokens: Tensor  # [R, L]
    positions: Tensor  # [R, L] of each token in its caption
    captions: Tensor  # [R, L] number of the caption that a token belongs to, -1 for padding
    rows: Tensor  # [N] row of each caption
    ends: Tensor  # [N] column of its end-of-text token

    def attention_mask(self, dtype: torch.dtype) -> Tensor:
        """[R, 1, L, L], 0 where a query sees a key (of its own caption, not after it), else -inf."""
        same = self.captions[:, :, None] == self.captions[:, None, :]
        mask = torch.zeros(same.shape, dtype=dtype, device=same.device)
        return mask.masked_fill_(~same.tril(), float("-inf"))[:, None]

    def tokens_of(self, wanted: Tensor, pad: int) -> Tensor:
        """Tokens [k, width] of the captions `wanted`, distinct int64 [k], one a row, with `pad` behind the end."""
        place = torch.full_like(self.rows, -1)
        place[wanted] = torch.arange(len(wanted), device=wanted.device)
        row = torch.where(self.captions >= 0, place[self.captions], -1)  # of each cell
        cells = row >= 0
        column = self.positions[cells]
        tokens = self.tokens.new_full((len(wanted), int(column.max()) + 1), pad)
        tokens[row[cells], column] = self.tokens[cells]
        return tokens


def pack(tokens: Tensor, lengths: Sequence[int], ends: Tensor, context: int) -> PackedCaptions:
    """Put int64 `tokens` [N, width], of which row i needs its first lengths[i], in rows of at most `context` tokens.

    First fit, longest first, in rows of twice the longest caption: with captions of 8 to 25 tokens, rows of 25 stay
    9 % empty, rows of 50 only 4 %. `ends` [N] are the positions of the end-of-text tokens.
    """
    room = min(2 * max(lengths), context)
    used: list[int] = []
    rows, starts = [0] * len(lengths), [0] * len(lengths)
    for caption in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        row = next((r for r, length in enumerate(used) if length + lengths[caption] <= room), len(used))
        if row == len(used):
            used.append(0)
        rows[caption], starts[caption] = row, used[row]
        used[row] += lengths[caption]
    source, positions, captions = ([[fill] * max(used) for _ in used] for fill in (0, 0, -1))
    for caption, (row, start, length) in enumerate(zip(rows, starts, lengths, strict=True)):
        cells, first = slice(start, start + length), caption * tokens.shape[1]
        source[row][cells] = range(first, first + length)
        positions[row][cells] = range(length)
        captions[row][cells] = [caption] * length
    index = [
        torch.tensor(values).to(tokens.device, non_blocking=True)
        for values in (source, positions, captions, rows, starts)
    ]
    return PackedCaptions(tokens.flatten()[index[0]], index[1], index[2], index[3], index[4] + ends)
