"""SaferClip: the sum of its terms, labels, and what it refuses."""

import pytest
import torch

from saferclip_fast import SafeBank, nearest_safe, preservation_loss, retarget_loss
from saferclip_fast.objectives import DEFAULT_WEIGHTS, QuadrupletEmbeddings, SaferClip

B, D = 6, 16


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)

    def rows(count=B):
        return torch.randn(count, D, generator=generator, dtype=torch.float64)

    current = QuadrupletEmbeddings(*(rows().requires_grad_() for _ in range(4)))
    frozen = QuadrupletEmbeddings(*(rows() for _ in range(4)))
    return current, frozen, SafeBank(rows(30), rows(30))


def test_loss_is_the_weighted_sum_of_the_ops(batch):
    current, frozen, bank = batch
    objective = SaferClip({"uni_text": 3.0, "nce_image": 0.7}, k=3, tau=0.1, beta=2.0, margin=0.1, negative="frozen")
    out = objective(*batch)
    redirect = retarget_loss(*current[2:], *frozen[2:], bank, 3, tau=0.1, beta=2.0, margin=0.1)
    preserve = preservation_loss(*current[:2], *frozen[:2])
    assert out.terms == redirect.terms | preserve.terms
    weights = {**DEFAULT_WEIGHTS, "uni_text": 3.0, "nce_image": 0.7}
    torch.testing.assert_close(out.loss.detach(), sum(weights[name] * term for name, term in out.terms.items()))


def test_offline_neighbors_equal_in_step_search(batch):
    current, frozen, bank = batch
    objective = SaferClip(k=2)
    found = nearest_safe(frozen.unsafe_text, bank, 2)
    assert torch.equal(objective(*batch).loss, objective(*batch, neighbors=found).loss)


def test_rows_labelled_safe_are_kept_not_redirected(batch):
    current, frozen, bank = batch
    labels = torch.tensor([1, 0, 1, 0, 1, 1])
    only_redirect = SaferClip(dict.fromkeys(DEFAULT_WEIGHTS, 0.0) | {"uni_text": 1.0, "cross_text": 1.0})
    out = only_redirect(*batch, unsafe_text=labels)
    assert not torch.autograd.grad(out.loss, current.unsafe_text)[0][labels == 0].any()
    keeps = SaferClip(dict.fromkeys(DEFAULT_WEIGHTS, 0.0) | {"cos_text": 1.0})
    out = keeps(*batch, unsafe_text=labels)
    expected = 1 - torch.cosine_similarity(current.unsafe_text, frozen.unsafe_text)[labels == 0]
    torch.testing.assert_close(out.terms["kept_text"].double(), expected.mean().detach(), rtol=1e-6, atol=1e-6)
    grad = torch.autograd.grad(out.loss, current.unsafe_text)[0]
    assert grad[labels == 0].any(1).all() and not grad[labels == 1].any()


def test_bad_options():
    with pytest.raises(ValueError, match=r"unknown terms \['uni'\]"):
        SaferClip({"uni": 1.0})
    with pytest.raises(ValueError, match="negative='both'"):
        SaferClip(negative="both")
    with pytest.raises(ValueError, match="k=0"):
        SaferClip(k=0)
