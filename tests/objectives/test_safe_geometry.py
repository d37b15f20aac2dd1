"""The terms over the geometry of safe rows: their definition row by row, known cases, and what a weight of 0 costs."""

import functools
import math

import numpy as np
import pytest
import torch

from saferclip_fast import SafeBank, preservation_loss, retarget_loss
from saferclip_fast.data.quadruplets import QuadrupletEmbeddings
from saferclip_fast.objectives import DEFAULT_WEIGHTS, SaferClip, safer_clip
from saferclip_fast.objectives.safe_geometry import neighbors_lost, spread_lost

B, D = 9, 6
OPS = {
    "retarget": ("uni_text", "uni_image", "cross_text", "cross_image"),
    "preserve": ("cos_text", "cos_image", "nce_text", "nce_image"),
}
TERMS = {"spread": spread_lost, "neighbors": neighbors_lost}


def rows(seed, count=B, shift=0.0):
    return torch.randn(count, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + shift


def cone(angle, count=12):
    """Unit rows at `angle` from an axis, each in a direction of its own: the spread is sin^2(angle) (1 - 1/count)."""
    axis = torch.full((count, 1), math.cos(angle), dtype=torch.float64)
    return torch.cat([axis, math.sin(angle) * torch.eye(count, dtype=torch.float64)], 1)


@pytest.fixture
def batch():
    """Current safe rows lie closer together than the frozen ones, so that both terms act."""
    current = QuadrupletEmbeddings(*(rows(i, shift=1 - i % 2).requires_grad_() for i in range(4)))
    current = current._replace(safe_image=rows(1, shift=2.0).requires_grad_())
    return current, QuadrupletEmbeddings(*(rows(10 + i) for i in range(4))), SafeBank(rows(20, 30), rows(21, 30))


def transcription(now, frozen, k):
    """(spread, neighbors) by their definitions, in numpy float64; nothing is shared with the code under test."""
    z, z0 = (x.detach().numpy() / np.linalg.norm(x.detach().numpy(), axis=1, keepdims=True) for x in (now, frozen))
    n = len(z)
    s, s0 = (sum(((row - x.mean(0)) ** 2).sum() for row in x) / n for x in (z, z0))
    pairs = [
        (i, j) for i in range(n) for j in sorted((j for j in range(n) if j != i), key=lambda j: -z0[i] @ z0[j])[:k]
    ]
    a, b = (np.array([x[i] @ x[j] for i, j in pairs]) for x in (z, z0))
    a, b = ((x - x.mean()) / x.std() for x in (a, b))
    return max(0.0, s0 - s), 1 - sum(x * y for x, y in zip(a, b, strict=True)) / len(pairs)


@pytest.mark.parametrize("k", [3, B - 1])
def test_both_terms_equal_a_transcription(k):
    now, frozen = 3 * rows(0, shift=1.0), rows(1)
    spread, neighbors = transcription(now, frozen, k)
    assert float(spread_lost(now, frozen)) == pytest.approx(spread, rel=1e-6) and spread > 0.1
    assert float(neighbors_lost(now, frozen, k)) == pytest.approx(neighbors, rel=1e-6) and 0.1 < neighbors < 1.9


@pytest.mark.parametrize("term", [spread_lost, functools.partial(neighbors_lost, k=4)])
def test_gradients(term):
    frozen = rows(1)
    assert torch.autograd.gradcheck(lambda x: term(x, frozen), rows(0, shift=1.0).requires_grad_())


def test_a_rotation_costs_nothing():
    frozen, rotation = rows(2), torch.linalg.qr(rows(3, D))[0]
    turned = 3 * frozen @ rotation
    assert float(spread_lost(turned, frozen)) == pytest.approx(0, abs=1e-12)
    assert float(neighbors_lost(turned, frozen, 4)) == pytest.approx(0, abs=1e-12)


def test_a_narrower_cone_has_lost_the_known_spread_and_a_wider_one_none():
    narrow, wide = cone(0.2), cone(0.8)
    expected = (math.sin(0.8) ** 2 - math.sin(0.2) ** 2) * (1 - 1 / 12)
    assert float(spread_lost(narrow, wide)) == pytest.approx(expected, rel=1e-9)
    wider = wide.clone().requires_grad_()
    loss = spread_lost(wider, narrow)
    assert float(loss.detach()) == 0 and not torch.autograd.grad(loss, wider)[0].any()


def test_a_collapse_has_lost_all_spread_and_every_difference_between_pairs():
    frozen, collapsed = rows(4), torch.ones(B, D, dtype=torch.float64, requires_grad=True)
    spread = (frozen / frozen.norm(dim=1, keepdim=True)).var(0, correction=0).sum()
    assert float(spread_lost(collapsed, frozen).detach()) == pytest.approx(float(spread), rel=1e-9)
    loss = neighbors_lost(collapsed, frozen, 4)
    assert float(loss.detach()) == pytest.approx(1)
    assert torch.isfinite(torch.autograd.grad(loss, collapsed)[0]).all()


@pytest.mark.parametrize("count", [1, 2])
def test_too_few_rows_for_neighbors_cost_nothing(count):
    x = rows(5, count).requires_grad_()
    loss = neighbors_lost(x, rows(6, count))
    loss.backward()
    assert float(loss.detach()) == 0 and not x.grad.any()


def test_the_objective_adds_both_terms_of_safe_texts_and_images(batch):
    current, frozen, bank = batch
    only = dict.fromkeys(DEFAULT_WEIGHTS, 0.0)
    out = SaferClip(only | {"spread": 3.0, "neighbors": 0.5})(*batch)
    expected = {
        name: float(term(current.safe_text, frozen.safe_text) + term(current.safe_image, frozen.safe_image))
        for name, term in TERMS.items()
    }
    assert expected["spread"] > 0.1 and {name: float(out.terms[name]) for name in TERMS} == pytest.approx(expected)
    assert float(out.loss.detach()) == pytest.approx(3 * expected["spread"] + 0.5 * expected["neighbors"])
    grads = torch.autograd.grad(out.loss, list(current), allow_unused=True)
    assert all(grad.any() for grad in grads[:2]) and not any(grad.any() for grad in grads[2:] if grad is not None)


def test_with_a_weight_of_0_a_term_is_not_computed_and_the_loss_is_the_same_bits(batch, monkeypatch):
    current, frozen, bank = batch

    def never(*_):
        raise AssertionError("computed all the same")

    monkeypatch.setattr(safer_clip, "of_batch", never)
    objective = SaferClip(k=2, negative="frozen")
    objective.attach(bank)
    out = objective(*batch)
    assert not {"spread", "neighbors"} & set(out.terms)
    w = {name: {term: DEFAULT_WEIGHTS[term] for term in names} for name, names in OPS.items()}
    redirect = retarget_loss(
        *current[2:],
        *frozen[2:],
        bank,
        2,
        tau=0.05,
        weights=w["retarget"],
        beta=objective.beta,
        margin=objective.margin,
    )
    held = preservation_loss(*current[:2], *frozen[:2], weights=w["preserve"])
    guard = DEFAULT_WEIGHTS["rank_guard"] * out.terms["rank_guard"]
    assert torch.equal(out.loss, redirect.loss + held.loss + guard)
