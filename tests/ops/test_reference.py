"""The reference ops against an independent transcription of the formulas, with autograd's gradients."""

import pytest
import torch
import torch.nn.functional as F

from saferclip_fast import Neighbors, SafeBank, nearest_safe, preservation_loss, retarget_loss
from saferclip_fast.ops import reference

B, D, N = 7, 12, 40


def rows(count, generator, **kwargs):
    return torch.randn(count, D, dtype=torch.float64, generator=generator).mul(3).requires_grad_(**kwargs)


@pytest.fixture
def inputs():
    generator = torch.Generator().manual_seed(0)
    text, image = (rows(B, generator, requires_grad=True) for _ in range(2))
    frozen_text, frozen_image, bank_text, bank_image = (rows(n, generator, requires_grad=False) for n in (B, B, N, N))
    return text, image, frozen_text, frozen_image, SafeBank(bank_text, bank_image)


def cosine(a, b):
    return (F.normalize(a, dim=-1) * F.normalize(b, dim=-1)).sum(-1)


def softplus(x, beta):
    return torch.log(1 + torch.exp(beta * x)) / beta


def transcribed_retarget(text, image, frozen_text, frozen_image, bank, k, tau, beta, margin, current):
    """docs/method.md, "SafeR-CLIP", word for word, one row at a time."""
    terms = torch.zeros(4, dtype=torch.float64)
    for i in range(B):
        similarity = cosine(frozen_text[i], bank.text)
        best = similarity.argsort(descending=True)[:k]
        w = torch.softmax(similarity[best] / tau, 0)
        negative_v = image[i].detach() if current else frozen_image[i]
        negative_t = text[i].detach() if current else frozen_text[i]

        def to_safe(x, side, w=w, best=best):
            return sum(w_j * cosine(x, side[j]) for w_j, j in zip(w, best, strict=True))

        terms = terms + torch.stack(
            [
                1 - to_safe(text[i], bank.text),
                1 - to_safe(image[i], bank.image),
                softplus(cosine(text[i], negative_v) - to_safe(text[i], bank.image) + margin, beta),
                softplus(cosine(image[i], negative_t) - to_safe(image[i], bank.text) + margin, beta),
            ]
        )
    return terms / B


@pytest.mark.parametrize("current", [False, True])
@pytest.mark.parametrize(("k", "beta", "margin"), [(1, 1.0, 0.0), (5, 4.0, 0.2)])
def test_retarget_loss_is_the_papers(inputs, k, beta, margin, current):
    text, image, frozen_text, frozen_image, bank = inputs
    weights = {"uni_text": 0.5, "uni_image": 2.0, "cross_text": 3.0, "cross_image": 0.25}
    expected = transcribed_retarget(*inputs, k, 0.1, beta, margin, current)
    expected_loss = (expected * torch.tensor(list(weights.values()))).sum()
    expected_grads = torch.autograd.grad(expected_loss, (text, image))
    negative = "current" if current else "frozen"
    out = retarget_loss(
        *inputs, k=k, tau=0.1, weights=weights, beta=beta, margin=margin, negative=negative, backend="reference"
    )
    grads = torch.autograd.grad(out.loss, (text, image))
    # the neighbor weights are float32
    torch.testing.assert_close(torch.stack(list(out.terms.values())), expected.detach(), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(out.loss, expected_loss, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(grads, expected_grads, rtol=1e-5, atol=1e-6)


def test_preservation_loss_is_clips(inputs):
    text, image, frozen_text, frozen_image, _ = inputs
    weights = {"cos_text": 0.5, "cos_image": 2.0, "nce_text": 3.0, "nce_image": 0.25}
    u_t, u_v, f_t, f_v = (F.normalize(x, dim=-1) for x in (text, image, frozen_text, frozen_image))
    target = torch.arange(B)

    def nce(x, y):
        logits = 20.0 * x @ y.T
        return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2

    expected = torch.stack(
        [(1 - (u_t * f_t).sum(-1)).mean(), (1 - (u_v * f_v).sum(-1)).mean(), nce(u_t, f_v), nce(u_v, f_t)]
    )
    expected_loss = (expected * torch.tensor(list(weights.values()))).sum()
    out = preservation_loss(text, image, frozen_text, frozen_image, weights=weights, logit_scale=20.0)
    torch.testing.assert_close(torch.stack(list(out.terms.values())), expected.detach())
    torch.testing.assert_close(
        torch.autograd.grad(out.loss, (text, image)), torch.autograd.grad(expected_loss, (text, image))
    )


@pytest.mark.parametrize("k", [1, 3])
def test_gradcheck(inputs, k):
    text, image, frozen_text, frozen_image, bank = inputs

    def redirect(t, v):
        return retarget_loss(t, v, frozen_text, frozen_image, bank, k=k, beta=3.0, margin=0.1).loss

    def preserve(t, v):
        return preservation_loss(t, v, frozen_text, frozen_image, logit_scale=10.0).loss

    assert torch.autograd.gradcheck(redirect, (text, image))
    assert torch.autograd.gradcheck(preserve, (text, image))


def test_chunking_changes_nothing(inputs, monkeypatch):
    text, image, frozen_text, frozen_image, bank = inputs

    def everything():
        found = nearest_safe(frozen_text, bank, 7, backend="reference")
        redirect = retarget_loss(*inputs, k=3, backend="reference")
        preserve = preservation_loss(text, image, frozen_text, frozen_image, backend="reference")
        grads = torch.autograd.grad(redirect.loss + preserve.loss, (text, image))
        return [*found, *redirect.terms.values(), *preserve.terms.values(), *grads]

    whole = everything()
    monkeypatch.setattr(reference, "CHUNK_ELEMENTS", 30)
    for a, b in zip(whole, everything(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_nothing_of_size_b_by_n_is_stored(monkeypatch):
    """The largest tensor any reference op makes stays far below [Q, N] and [B, B]."""
    from torch.utils._python_dispatch import TorchDispatchMode

    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            out = function(*args, **(kwargs or {}))
            for value in out if isinstance(out, tuple) else (out,):
                if isinstance(value, torch.Tensor):
                    largest = max(largest, value.numel())
            return out

    monkeypatch.setattr(reference, "CHUNK_ELEMENTS", 4096)
    x, bank = torch.randn(300, 8), F.normalize(torch.randn(2000, 8), dim=-1)
    with Watch():
        reference.nearest_safe(x, bank, 3)
        assert largest <= 20_000 < 300 * 2000
        largest = 0
        reference.preservation_loss(x, x + 1, x, x, [1.0] * 4, 100.0, True)
    assert largest <= 8192 < 300 * 300


def test_ties_go_to_the_lower_index_and_zero_queries_score_zero():
    bank = torch.eye(4).repeat(3, 1)
    found = nearest_safe(torch.tensor([[0.0, 2, 0, 0], [0, 0, 0, 0], [0, -1, 0, 0]]), bank, 5, backend="reference")
    assert found.indices.tolist() == [[1, 5, 9, 0, 2], [0, 1, 2, 3, 4], [0, 2, 3, 4, 6]]
    assert found.scores.tolist() == [[1, 1, 1, 0, 0], [0, 0, 0, 0, 0], [0, 0, 0, 0, 0]]


def test_zero_rows_give_a_finite_loss_and_no_gradient(inputs):
    text, image, frozen_text, frozen_image, bank = inputs
    with torch.no_grad():
        text[2], image[3], frozen_text[4] = 0, 0, 0
    loss = (
        retarget_loss(text, image, frozen_text, frozen_image, bank, k=2).loss
        + preservation_loss(text, image, frozen_text, frozen_image).loss
    )
    grad_text, grad_image = torch.autograd.grad(loss, (text, image))
    assert torch.isfinite(loss) and torch.isfinite(grad_text).all() and torch.isfinite(grad_image).all()
    assert not grad_text[2].any() and not grad_image[3].any()


def test_labels_choose_the_rows_of_each_term(inputs):
    text, image, frozen_text, frozen_image, bank = inputs
    text_is_unsafe = torch.tensor([1, 1, 0, 1, 0, 0, 1])
    image_is_unsafe = torch.tensor([1, 0, 1, 1, 0, 1, 1])
    both = (text_is_unsafe * image_is_unsafe).bool()
    out = retarget_loss(*inputs, text_is_unsafe=text_is_unsafe, image_is_unsafe=image_is_unsafe)

    def on(mask, term):
        found = Neighbors(*(x[mask] for x in out.neighbors))
        part = [x[mask] for x in inputs[:4]]
        return retarget_loss(*part, bank, neighbors=found).terms[term]

    for term, mask in (
        ("uni_text", text_is_unsafe.bool()),
        ("uni_image", image_is_unsafe.bool()),
        ("cross_text", both),
        ("cross_image", both),
    ):
        torch.testing.assert_close(out.terms[term], on(mask, term), rtol=1e-6, atol=1e-7)
    grad_text, grad_image = torch.autograd.grad(out.loss, (text, image))
    assert not grad_text[text_is_unsafe == 0].any(), "a text labeled safe was redirected"
    assert not grad_image[image_is_unsafe == 0].any(), "an image labeled safe was redirected"
    none = retarget_loss(*inputs, text_is_unsafe=torch.zeros(B), image_is_unsafe=torch.zeros(B))
    assert none.loss.item() == 0
