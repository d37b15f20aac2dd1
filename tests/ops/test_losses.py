"""Both losses on every backend: the error against float64 is compared with that of the plain PyTorch path."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import normalize

from saferclip_fast.ops import reference
from tests.ops.variants import threads, variants
from tests.support.error_rule import check_loss, wide

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
RETARGET = pytest.mark.parametrize("run", variants("retarget_loss"), ids=str)
PRESERVE = pytest.mark.parametrize("run", variants("preservation_loss"), ids=str)


def rows(batch, d, dtype, generator):
    """Rows of lengths from 0.1 to 10, and one zero row."""
    x = torch.randn(batch, d, generator=generator) * torch.logspace(-1, 1, batch).unsqueeze(1)
    x[batch // 2] = 0
    return x.to(dtype)


def retarget_arguments(batch, d, bank_rows, k, dtype, seed=0, current=False, bank_dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    inputs = [rows(batch, d, dtype, g) for _ in range(4)]
    if batch > 3:
        inputs[1] = inputs[1].roll(1, 0)  # so that the zero rows of text and image differ
    bank = [normalize(torch.randn(bank_rows, d, generator=g), dim=1).to(bank_dtype) for _ in range(2)]
    neighbors = torch.randint(bank_rows, (batch, k), generator=g)
    weights = torch.softmax(torch.randn(batch, k, generator=g), 1)
    row_weights = torch.rand(batch, 4, generator=g) / batch
    row_weights[0] = 0
    return *inputs, *bank, neighbors, weights, row_weights, [1.0, 2.0, 0.5, 0.7], 3.0, 0.1, current, True


def preservation_arguments(batch, d, dtype, seed=0, weights=(1.0, 2.0, 0.5, 0.7), scale=100.0):
    g = torch.Generator().manual_seed(seed)
    return *(rows(batch, d, dtype, g) for _ in range(4)), list(weights), scale, True


def assert_no_worse_than_plain(op, run, args):
    check_loss(op, list(run(op, *args)), list(args))


SHAPES = [(1, 1, 1, 1), (5, 16, 10, 1), (33, 77, 50, 2), (70, 130, 64, 5), (64, 256, 300, 1), (100, 33, 7, 7)]


@RETARGET
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("current", [False, True])
def test_retarget_error(run, dtype, current):
    for batch, d, n, k in SHAPES:
        assert_no_worse_than_plain("retarget_loss", run, retarget_arguments(batch, d, n, k, dtype, current=current))


@RETARGET
def test_retarget_mixed_dtypes(run):
    args = list(retarget_arguments(20, 40, 30, 2, torch.bfloat16, bank_dtype=torch.float16))
    assert_no_worse_than_plain("retarget_loss", run, args)
    args[2:4] = [x.float() for x in args[2:4]]
    assert_no_worse_than_plain("retarget_loss", run, args)


@RETARGET
@settings(max_examples=25, deadline=None, derandomize=True)
@given(data=st.data())
def test_retarget_random_shapes(run, data):
    d = data.draw(st.integers(2, 70))  # at d = 1 the gradient is 0: nothing to compare with
    batch, n, k = (data.draw(st.integers(1, high)) for high in (40, 40, 9))
    dtype = data.draw(st.sampled_from(DTYPES))
    args = retarget_arguments(batch, d, n, k, dtype, data.draw(st.integers(0, 99)), data.draw(st.booleans()))
    assert_no_worse_than_plain("retarget_loss", run, args)


@RETARGET
@pytest.mark.parametrize("scale", [1e-30, 1e-18, 1e18, 1e30])
@pytest.mark.parametrize("current", [False, True])
def test_retarget_rows_of_any_scale(run, scale, current):
    """Scaling a row changes neither loss nor, but for its own scale, the gradient: plain float32 loses such rows."""
    args = list(retarget_arguments(12, 40, 30, 1, torch.float32, current=current))
    truth = reference.retarget_loss(*wide(args))
    args[:4] = [x * scale for x in args[:4]]
    got = run("retarget_loss", *args)
    torch.testing.assert_close(got[1].double(), truth[1], rtol=1e-5, atol=1e-6)
    for x, t in zip(got[2:], truth[2:], strict=True):
        torch.testing.assert_close(x.double() * scale, t, rtol=1e-4, atol=1e-6 * t.abs().max().item())


@RETARGET
def test_retarget_large_batch_writes_past_the_cache_and_keeps_its_bits(run):
    args = retarget_arguments(4500, 512, 40, 1, torch.float32)  # 9 MB a gradient: the streaming stores
    results = []
    for count in (1, 2, 7):
        with threads(count):
            results.append(run("retarget_loss", *args))
    assert all(torch.equal(a, b) for r in results[1:] for a, b in zip(r, results[0], strict=True))
    assert_no_worse_than_plain("retarget_loss", run, args)


@RETARGET
def test_retarget_without_gradient_and_with_a_bad_neighbor(run):
    args = list(retarget_arguments(9, 20, 30, 2, torch.float32))
    full = run("retarget_loss", *args)
    loss, terms, *grads = run("retarget_loss", *args[:-1], False)
    assert torch.equal(loss, full[0]) and torch.equal(terms, full[1])
    assert [g.shape for g in grads] == [(0, 20), (0, 20)]
    for bad in (-1, 30):
        args[6] = args[6].clone()
        args[6][3, 1] = bad
        with pytest.raises(RuntimeError, match=f"neighbor {bad} is outside the bank of 30 rows"):
            run("retarget_loss", *args)


@PRESERVE
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_preservation_error(run, dtype):
    for batch, d in ((1, 1), (2, 3), (17, 16), (33, 77), (300, 40), (523, 64)):
        assert_no_worse_than_plain("preservation_loss", run, preservation_arguments(batch, d, dtype))


@PRESERVE
@settings(max_examples=20, deadline=None, derandomize=True)
@given(data=st.data())
def test_preservation_random_shapes(run, data):
    batch, d = data.draw(st.integers(1, 90)), data.draw(st.integers(2, 70))
    scale = data.draw(st.sampled_from([0.5, 20.0, 100.0]))
    dtype = data.draw(st.sampled_from(DTYPES))
    args = preservation_arguments(batch, d, dtype, data.draw(st.integers(0, 99)), scale=scale)
    assert_no_worse_than_plain("preservation_loss", run, args)


@PRESERVE
def test_preservation_with_far_apart_logits(run):
    """Half the rows match at +1, half are opposite at -1: exp of a common offset would underflow for half of them."""
    g = torch.Generator().manual_seed(0)
    text = normalize(torch.randn(300, 32, generator=g), dim=1)
    other = text * torch.where(torch.arange(300) % 2 == 0, 1.0, -1.0).unsqueeze(1)
    args = (text, text, text, other, [1.0, 1.0, 1.0, 1.0], 100.0, True)
    assert_no_worse_than_plain("preservation_loss", run, args)


@PRESERVE
def test_preservation_same_bits_whatever_the_threads(run):
    args = preservation_arguments(700, 50, torch.float32)
    results = []
    for count in (1, 2, 7):
        with threads(count):
            results.append(run("preservation_loss", *args))
    assert all(torch.equal(a, b) for r in results[1:] for a, b in zip(r, results[0], strict=True))


@PRESERVE
def test_preservation_terms_of_weight_zero_and_no_gradient(run):
    args = preservation_arguments(40, 24, torch.float32, weights=(0.0, 1.0, 0.0, 1.0))
    assert_no_worse_than_plain("preservation_loss", run, args)
    loss, terms, *grads = run("preservation_loss", *args[:-1], False)
    assert terms[2] == 0 and terms[0] > 0
    assert [g.shape for g in grads] == [(0, 24), (0, 24)]
    assert torch.equal(loss, run("preservation_loss", *args)[0])
