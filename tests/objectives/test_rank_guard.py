"""The rank guard against its definition, row by row in numpy float64, and what it keeps redirected rows away from."""

import math

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from saferclip_fast import SafeBank
from saferclip_fast.bank import ShardedBank
from saferclip_fast.objectives.rank_guard import rank_guard, rank_guards
from saferclip_fast.ops.backends import MAX_NATIVE_K

D = 16


def rows(count, seed, dtype=torch.float64):
    return normalize(torch.randn(count, D, generator=torch.Generator().manual_seed(seed), dtype=dtype), dim=-1)


def transcription(x, queries, items, page, k, margin):
    """[B] (1 / k) sum over the k most violated queries of max(0, margin + x . q - limit)."""
    x, queries, items = (rows.double().numpy() for rows in (x, queries, items))
    scores = queries @ items.T
    limits = np.sort(scores, axis=1)[:, ::-1][:, math.ceil(page * len(items)) - 1]
    violation = np.sort(x @ queries.T - limits, axis=1)[:, ::-1][:, :k]
    return np.maximum(0, margin + violation).sum(1) / k


@pytest.mark.parametrize("page", [0.02, 0.1, 1.0])
@pytest.mark.parametrize(("k", "margin"), [(1, 0.0), (5, 0.1), (40, 0.0)])
def test_equals_a_transcription(page, k, margin):
    bank, x = SafeBank(rows(40, 0), rows(40, 1)), rows(7, 2)
    guards = rank_guards(bank, page)
    for guard, queries, items in ((guards.of_text, bank.image, bank.text), (guards.of_image, bank.text, bank.image)):
        got = rank_guard(3 * x, guard, k, margin, torch.ones(7)).values
        np.testing.assert_allclose(got.numpy(), transcription(x, queries, items, page, k, margin), atol=1e-6)


def test_gradient():
    guard = rank_guards(SafeBank(rows(40, 0), rows(40, 1)), 0.1).of_text
    x = rows(5, 3).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: rank_guard(x, guard, 6, 0.05, torch.arange(5.0)).loss, x, eps=1e-6)


def test_rows_that_no_query_finds_on_its_page_are_left_alone():
    """Such a row lies below the K-th best item of every query; the nearest one to a query does not."""
    cone = torch.ones(D, dtype=torch.float64) / 2
    bank = SafeBank(rows(200, 0) + cone, rows(200, 0) + rows(200, 1) / 2 + cone)
    guard = rank_guards(bank, 0.05).of_text
    limits = (bank.image @ bank.text.T).sort(1, descending=True).values[:, 9]
    candidates = normalize(rows(3000, 4) + torch.linspace(-2, 1, 3000).unsqueeze(1) * cone, dim=-1)
    clear = (candidates @ bank.image.T < limits).all(1)
    assert 0 < clear.sum() < len(candidates)
    values = rank_guard(candidates, guard, 4, 0.0, torch.ones(len(candidates))).values
    assert not values[clear].any() and (values[~clear] > 0).all()


def test_of_a_bank_beyond_the_kernels_k_a_sample_stands_for_it():
    """Rank page N is more than MAX_NATIVE_K: the limits are estimates, close to the ranks that they stand for."""
    count, page = 4 * MAX_NATIVE_K, 0.5
    bank = SafeBank(rows(count, 0), rows(count, 1))
    guard = rank_guards(bank, page).of_text
    limits = -math.sqrt(2) * guard.bank.image[:, D]
    scores = bank.image @ bank.text.T
    ranks = (scores > limits[:, None] + 1e-7).double().mean(1)
    assert (ranks - page).abs().max() < 0.12 and (ranks.mean() - page).abs() < 0.02


def test_a_sample_is_of_all_kinds_however_the_rows_are_ordered():
    """Two classes in turns: rows at even distances would all be of one, and the other's limits far too low."""
    page, count = 0.12, 2 * math.floor(MAX_NATIVE_K / 0.12)
    kinds = rows(2, 5)[torch.arange(count) % 2]
    bank = SafeBank(kinds + rows(count, 0) / 4, kinds + rows(count, 1) / 4)
    limits = -math.sqrt(2) * rank_guards(bank, page).of_text.bank.image[:, D]
    exact = (bank.image @ bank.text.T).topk(math.ceil(page * count)).values[:, -1]
    assert (limits - exact).abs().mean() < 0.01


def test_a_mapped_bank_has_the_same_guards(tmp_path):
    SafeBank(rows(50, 0, torch.float32), rows(50, 1, torch.float32)).save(tmp_path / "bank.safetensors")
    bank = SafeBank.load(tmp_path / "bank.safetensors")
    x = rows(6, 2, torch.float32)
    whole, mapped = rank_guards(bank, 0.1), rank_guards(ShardedBank(bank, device=torch.device("cpu")), 0.1)
    for one, other in zip(whole, mapped, strict=True):
        found = [rank_guard(x, guard, 4, 0.02, torch.ones(6)) for guard in (one, other)]
        assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
