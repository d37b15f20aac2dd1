"""nearest_safe_triton returns the reference's indices and scores: exactly, whatever the dtype, scale and ties."""

import pytest
import torch
import torch.nn.functional as F

from saferclip_fast.ops import reference
from saferclip_fast.ops.triton import configs, nearest_safe

from .device import DEVICE

OP = torch.ops.saferclip_fast.nearest_safe_triton
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


def rows(count, width, dtype=F32, seed=0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(count, width, generator=generator) * scale).to(dtype).to(DEVICE)


def unit_rows(count, width, dtype=F32, seed=1):
    return F.normalize(rows(count, width, seed=seed), dim=-1).to(dtype)


def assert_exact(query, bank, k):
    scores, indices = OP(query, bank, k)
    expected_scores, expected_indices = reference.nearest_safe(query, bank, k)
    assert torch.equal(indices, expected_indices)
    assert torch.equal(scores, expected_scores)


@pytest.fixture
def searched_again(monkeypatch):
    """How many queries had to be searched again, a call."""
    counts = []
    kernel = nearest_safe.merge_again_kernel

    class Spy:
        def __getitem__(self, grid):
            def launch(*arguments, **constants):
                counts.append(int(arguments[4]))
                kernel[grid](*arguments, **constants)

            return launch

    monkeypatch.setattr(nearest_safe, "merge_again_kernel", Spy())
    return counts


@pytest.mark.parametrize(
    ("queries", "bank_rows", "width", "k", "query_dtype", "bank_dtype"),
    [
        (1, 1, 1, 1, F32, F32),
        (2, 9, 5, 9, F32, F32),  # k = N
        (3, 700, 33, 1, F32, F32),
        (17, 641, 67, 3, BF16, BF16),  # 64 rows a block
        (5, 1300, 48, 17, F16, F16),  # several splits
        (2, 333, 130, 7, F32, BF16),  # the query is rounded to the bank's dtype
        (2, 300, 40, 2, BF16, F32),
        (1, 200, 24, 128, F32, F32),
        (1, 256, 16, 256, BF16, BF16),
    ],
)
def test_same_as_the_reference(queries, bank_rows, width, k, query_dtype, bank_dtype, searched_again):
    assert_exact(rows(queries, width, query_dtype, scale=3), unit_rows(bank_rows, width, bank_dtype), k)


def test_the_usual_query_is_proven_at_once(searched_again):
    assert_exact(rows(3, 64), unit_rows(1100, 64), 1)
    assert searched_again == [0]


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("k", [1, 6])
def test_rows_closer_than_the_screen_can_tell(dtype, k, searched_again):
    """40 rows within the screen's error of each other: only float64 orders them."""
    base, noise = unit_rows(1, 96, seed=5), unit_rows(300, 96, seed=6)
    bank = noise.clone()
    bank[150:190] = base + 3e-5 * noise[150:190]
    assert_exact(rows(1, 96, dtype, seed=9).add(4 * base).to(dtype), bank.to(dtype), k)
    assert searched_again == [1]


def test_equal_scores_give_the_lower_index(searched_again):
    bank = unit_rows(900, 32)
    bank[100:112] = bank[100]
    bank[600:615] = bank[100]
    assert_exact(torch.cat([bank[100:101] * 2, bank[5:6], -bank[100:101]]), bank, 3)
    assert_exact(bank[100:101], bank, 20)  # keeps 32 a split, so 12 and 15 equal rows are within
    assert searched_again == [1, 0]


def test_all_rows_equal():
    bank = unit_rows(1, 8).repeat(70, 1)
    assert_exact(rows(1, 8), bank, 3)


def test_zero_queries_score_zero_on_the_first_rows():
    query = rows(3, 12)
    query[1] = 0
    assert_exact(query, unit_rows(60, 12), 4)


@pytest.mark.parametrize("scale", [1e-30, 1e-4, 1e25])
def test_query_of_any_scale(scale):
    assert_exact(rows(3, 20, scale=scale), unit_rows(100, 20), 3)


def test_bank_rows_of_any_length():
    bank = unit_rows(300, 20) * torch.logspace(-6, 3, 300, device=DEVICE)[torch.randperm(300), None]
    assert_exact(rows(3, 20), bank, 4)


def test_float16_bank_with_subnormal_numbers():
    assert_exact(rows(2, 40), (unit_rows(200, 40) * 1e-5).to(F16), 3)


def test_no_query():
    scores, indices = OP(rows(0, 8), unit_rows(10, 8), 2)
    assert scores.shape == indices.shape == (0, 2)


def test_non_finite_input_ends_with_indices_in_range():
    query, bank = rows(3, 16), unit_rows(50, 16)
    query[0, 0], query[1, 3], bank[7, 2], bank[9, 1] = torch.nan, torch.inf, torch.nan, -torch.inf
    _, indices = OP(query, bank, 3)
    assert ((indices >= 0) & (indices < 50)).all()


@pytest.mark.parametrize("config", configs.SCREEN, ids=str)
def test_every_configuration(config, monkeypatch):
    dtype = BF16 if config.kwargs["BLOCK_WIDTH"] == 64 else F32
    monkeypatch.setattr(nearest_safe.screen_kernel, "configs", [config])
    assert_exact(rows(18, 70, dtype), unit_rows(150, 70, dtype), 3)


def test_too_many_neighbors_names_the_limit():
    with pytest.raises(ValueError, match=r"k=257.*at most 256.*reference"):
        OP(rows(1, 4), unit_rows(300, 4), 257)


def test_float64_bank_is_refused():
    with pytest.raises(ValueError, match="bank is float64"):
        OP(rows(1, 4), unit_rows(5, 4).double(), 1)


@pytest.mark.parametrize("bank_rows", [1, 511, 512, 10_000, 1_000_000])
@pytest.mark.parametrize("blocks", [1, 8, 5000])
@pytest.mark.parametrize("k", [1, 20, 256])
def test_what_is_kept_does_not_grow_with_the_bank(bank_rows, blocks, k):
    keep = nearest_safe.keep_for(k)
    splits, split_rows = nearest_safe.split_bank(blocks, bank_rows, keep, 132)
    assert splits * keep <= nearest_safe.MAX_SLOTS
    assert (splits - 1) * split_rows < bank_rows <= splits * split_rows
