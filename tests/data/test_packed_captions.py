"""Captions packed into full rows: every token is there once, and sees its own caption alone."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from saferclip_fast.data.packed_captions import pack


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 12), min_size=1, max_size=20))
def test_every_caption_lies_whole_in_one_row(lengths):
    tokens = torch.arange(1, 1 + len(lengths) * 12).view(-1, 12)
    packed = pack(tokens, lengths, torch.tensor(lengths) - 1, 77)
    assert max(lengths) <= packed.tokens.shape[1] <= 2 * max(lengths)
    for caption, length in enumerate(lengths):
        row, column = (packed.captions == caption).nonzero(as_tuple=True)
        assert set(row.tolist()) == {int(packed.rows[caption])}
        assert column.tolist() == list(range(int(column[0]), int(column[0]) + length))
        assert packed.tokens[row, column].tolist() == tokens[caption, :length].tolist()
        assert packed.positions[row, column].tolist() == list(range(length))
        assert int(packed.ends[caption]) == int(column[-1])
    assert int((packed.captions >= 0).sum()) == sum(lengths)


def test_rows_are_nearly_full():
    lengths = torch.randint(8, 26, (256,), generator=torch.Generator().manual_seed(0)).tolist()
    packed = pack(torch.ones(256, 25, dtype=torch.int64), lengths, torch.tensor(lengths) - 1, 77)
    assert sum(lengths) > 0.95 * packed.tokens.numel()


def test_a_token_sees_its_caption_up_to_itself():
    packed = pack(torch.ones(3, 4, dtype=torch.int64), [2, 4, 2], torch.tensor([1, 3, 1]), context=4)
    mask = packed.attention_mask(torch.float32)
    assert mask.shape == (2, 1, 4, 4)
    seen = [
        [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]],
        [[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 1]],
    ]
    assert (mask[:, 0] == 0).int().tolist() == seen and (mask[mask != 0] == float("-inf")).all()
