"""neighbor_hinge on every backend against its definition, one row and one neighbor at a time; each row by itself."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from saferclip_fast.ops import Neighbors, neighbor_hinge, reference
from tests.ops.variants import OPS, threads, variants

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Interpreted:
    """The Triton kernel, as tests/backends/triton runs it."""

    def __call__(self, op, *args):
        from tests.backends.triton.hardware_interpreter import correct_interpreter

        correct_interpreter()
        return getattr(OPS, f"{op}_triton")(*args)

    def __str__(self):
        return "triton"


EVERY = pytest.mark.parametrize("run", [*variants("neighbor_hinge"), Interpreted()], ids=str)


def problem(batch, d, found, dtype, seed=0, bank_rows=30):
    """Rows of lengths 0.1 to 10, one of them zero, guard rows, and their neighbors: some open, some not."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, d, generator=g) * torch.logspace(-1, 1, batch).unsqueeze(1)
    if batch > 2:
        x[batch // 2] = 0
    x = x.to(dtype)
    query = F.normalize(torch.randn(bank_rows, d, generator=g), dim=1)
    limit = 0.3 * torch.randn(bank_rows, generator=g).clamp(-1, 1)
    rows = torch.cat([query, -limit[:, None], (1 - limit.square()).sqrt()[:, None]], 1) / math.sqrt(2)
    indices = torch.randint(bank_rows, (batch, found), generator=g)
    above = (F.normalize(x.double(), dim=1).unsqueeze(1) * query.double()[indices]).sum(-1) - limit.double()[indices]
    row_weights = torch.rand(batch, generator=g) / batch
    row_weights[0] = 0
    return x, rows, indices, (above / 2).float(), row_weights


def transcription(x, rows, indices, scores, row_weights, margin, k):
    """In float64, with autograd's gradient; `scores` only say which hinges are open."""
    x = x.double().requires_grad_()
    u = x / x.norm(dim=1, keepdim=True).clamp(min=1e-300)
    near = math.sqrt(2) * rows.double()[indices]
    violation = (u.unsqueeze(1) * near[..., : x.shape[1]]).sum(-1) + near[..., x.shape[1]]
    is_open = 2 * scores.double() + margin > 0
    values = torch.where(is_open, margin + violation, 0.0).sum(1) / k
    loss = (row_weights.double() * values).sum()
    return loss.detach(), values.detach(), torch.autograd.grad(loss, x)[0]


def check(run, args, margin, k):
    x, rows, _, _, row_weights = args
    truth = transcription(*args, margin, k)
    loss, values, grad = run("neighbor_hinge", *args, margin, k, True)
    assert grad.dtype == x.dtype and loss.dtype == values.dtype == torch.float32
    alive = x.any(1)
    assert not grad[~alive].any() and not grad[0].any()
    kind, single = torch.finfo(x.dtype), torch.finfo(torch.float32).eps
    # a value is a sum of up to `found` products of size 1 with a rounding each, and of their elements
    terms = args[2].shape[1] * single
    assert ((values - truth[1]).abs() <= 2 * terms * (1 + margin)).all()
    assert (loss - truth[0]).abs() <= 2 * terms * (1 + margin) * row_weights.sum()
    length = x.double().norm(dim=1)
    size = row_weights * args[2].shape[1] / k  # of the sum of the open rows that a gradient is made of
    errors, sizes = ((g.double().norm(dim=1) * length)[alive] for g in (grad - truth[2], truth[2]))
    denormal = kind.smallest_normal * kind.eps * x.shape[1] ** 0.5 * length[alive]
    allowed = kind.eps * sizes + 4 * single * size[alive] + denormal
    assert (errors <= allowed).all(), (errors / allowed).max()


@EVERY
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_each_row_is_right(run, dtype):
    for batch, d, found, margin, k in ((1, 1, 1, 0.0, 1), (7, 5, 3, 0.1, 4), (33, 70, 16, 0.0, 16)):
        check(run, problem(batch, d, found, dtype), margin, k)


@EVERY
@settings(max_examples=20, deadline=None, derandomize=True)
@given(data=st.data())
def test_random_shapes(run, data):
    batch, d, found = data.draw(st.integers(1, 20)), data.draw(st.integers(1, 50)), data.draw(st.integers(1, 9))
    args = problem(batch, d, found, data.draw(st.sampled_from(DTYPES)), data.draw(st.integers(0, 99)))
    check(run, args, data.draw(st.sampled_from([-0.2, 0.0, 0.3])), found + data.draw(st.integers(0, 2)))


@EVERY
def test_half_precision_guard_rows(run):
    x, rows, *rest = problem(9, 33, 4, torch.float32)
    check(run, (x, rows.to(torch.bfloat16), *rest), 0.1, 4)


@EVERY
def test_a_hinge_of_exactly_zero_is_closed(run):
    x = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    rows = torch.tensor([[0.0, 1.0, -0.25, 0.0]]) / math.sqrt(2)
    scores = torch.tensor([[-0.125], [-0.125 + 2**-26]])
    args = (x, rows, torch.zeros(2, 1, dtype=torch.int64), scores, torch.ones(2))
    loss, values, grad = run("neighbor_hinge", *args, 0.25, 1, True)
    assert not grad[0].any() and values[0] == 0
    torch.testing.assert_close(grad[1], torch.tensor([0.0, 1.0]))


@EVERY
def test_without_gradient_and_the_same_bits_each_time(run):
    args = problem(70, 24, 5, torch.float32)
    full = run("neighbor_hinge", *args, 0.1, 5, True)
    loss, values, grad = run("neighbor_hinge", *args, 0.1, 5, False)
    assert torch.equal(loss, full[0]) and torch.equal(values, full[1]) and grad.shape == (0, 24)
    for count in (2, 7):
        with threads(count):
            assert all(torch.equal(a, b) for a, b in zip(full, run("neighbor_hinge", *args, 0.1, 5, True), strict=True))


@pytest.mark.parametrize("run", variants("neighbor_hinge"), ids=str)
def test_a_bad_neighbor_is_refused(run):
    args = list(problem(5, 8, 2, torch.float32))
    for bad in (-1, 30):
        args[2] = args[2].clone()
        args[2][3, 1] = bad
        with pytest.raises(RuntimeError, match=f"neighbor {bad} is outside the bank of 30 rows"):
            run("neighbor_hinge", *args, 0.0, 2, True)


def test_reference_and_gradcheck(monkeypatch):
    monkeypatch.setattr(reference, "CHUNK_ELEMENTS", 50)
    x, rows, indices, scores, row_weights = problem(6, 7, 4, torch.float64)
    x = x.double() + 0.1
    args = (rows.double(), indices, scores.abs(), row_weights.double())
    truth = transcription(x, *args, 0.1, 5)
    for found, expected in zip(reference.neighbor_hinge(x, *args, 0.1, 5, True), truth, strict=True):
        torch.testing.assert_close(found, expected)
    neighbors = Neighbors(scores.abs(), indices)

    def loss(x):
        return neighbor_hinge(x, args[0], neighbors, args[3], margin=0.1, k=5).loss

    assert torch.autograd.gradcheck(loss, x.requires_grad_())
