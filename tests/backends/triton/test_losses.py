"""retarget_loss_triton and preservation_loss_triton: loss, terms and both gradients within the error rule."""

import pytest
import torch
import torch.nn.functional as F

from tests.support.error_rule import check_loss

from .device import DEVICE, DTYPES

WEIGHTS = [0.5, 1.0, 0.3, 0.2]


def embeddings(batch, width, dtype, scale=3.0, seed=0):
    """Text, image and their frozen versions, related to one another as in training."""
    generator = torch.Generator().manual_seed(seed)
    text, image, noise = torch.randn(3, batch, width, generator=generator) * scale
    made = text, image, text + 2 * noise, 0.5 * text + image
    return [x.to(dtype).to(DEVICE) for x in made]


def assert_op(op, arguments):
    got = getattr(torch.ops.saferclip_fast, f"{op}_triton")(*arguments)
    check_loss(op, list(got), arguments)
    return got


def retarget_arguments(x, neighbors=3, bank_rows=20, weights=WEIGHTS, beta=2.0, margin=0.1, current=False, grad=True):
    (batch, width), dtype = x[0].shape, x[0].dtype
    generator = torch.Generator().manual_seed(7)
    bank = [F.normalize(torch.randn(bank_rows, width, generator=generator), dim=-1).to(dtype) for _ in range(2)]
    index = torch.randint(bank_rows, (batch, neighbors), generator=generator)
    neighbor_weights = torch.softmax(torch.randn(batch, neighbors, generator=generator), 1)
    row_weights = torch.rand(batch, 4, generator=generator) / max(batch, 1)
    drawn = [tensor.to(DEVICE) for tensor in (*bank, index, neighbor_weights, row_weights)]
    return [*x, *drawn, weights, beta, margin, current, grad]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("batch", "width", "neighbors", "current"), [(1, 1, 1, False), (9, 37, 3, True), (4, 515, 5, False)]
)
def test_retarget(batch, width, neighbors, current, dtype):
    assert_op("retarget_loss", retarget_arguments(embeddings(batch, width, dtype), neighbors, current=current))


def test_retarget_without_gradient_or_rows():
    assert_op("retarget_loss", retarget_arguments(embeddings(5, 20, torch.float32), grad=False))
    loss, *_ = torch.ops.saferclip_fast.retarget_loss_triton(*retarget_arguments(embeddings(0, 20, torch.float32)))
    assert loss == 0


@pytest.mark.parametrize("scale", [1e-18, 1e15])
def test_rows_of_any_scale_and_zero_rows(scale):
    x = embeddings(6, 24, torch.float32)
    x = [m * scale for m in x]
    for m in x:
        m[2] = 0
    for op, arguments in (
        ("retarget_loss", retarget_arguments(x)),
        ("preservation_loss", [*x, WEIGHTS, 100.0, True]),
    ):
        *_, grad_text, grad_image = assert_op(op, arguments)
        assert (grad_text[2] == 0).all() and (grad_image[2] == 0).all()


@pytest.mark.parametrize("beta", [0.01, 100.0])
def test_retarget_softplus_at_both_ends(beta):
    assert_op("retarget_loss", retarget_arguments(embeddings(8, 16, torch.float32), beta=beta, margin=-0.3))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("batch", "width"), [(1, 5), (13, 33), (5, 300)])
def test_preservation(batch, width, dtype):
    assert_op("preservation_loss", [*embeddings(batch, width, dtype), WEIGHTS, 100.0, True])


def test_preservation_near_the_optimum():
    """Rows that match their frozen counterparts: small losses and gradients (1e-3), of logits near 100."""
    text, _, noise, _ = embeddings(20, 64, torch.float32)
    text = text + 2.5 * text[:1]
    x = [text, text + 0.01 * noise, text + 0.02 * noise, text - 0.01 * noise]
    loss, *_ = assert_op("preservation_loss", [*x, [0.0, 0.0, 1.0, 1.0], 100.0, True])
    assert 1e-5 < loss < 0.1


def test_preservation_of_mixed_dtypes():
    x = embeddings(10, 40, torch.bfloat16)
    x[2:] = [m.float() for m in x[2:]]
    assert_op("preservation_loss", [*x, WEIGHTS, 50.0, True])


@pytest.mark.parametrize("weights", [[1.0, 1.0, 0.0, 0.0], [0.0, 1.0, 2.0, 0.0], [1.0, 0.0, 0.0, 2.0]])
def test_a_term_of_weight_zero_is_not_computed(weights):
    got = assert_op("preservation_loss", [*embeddings(9, 20, torch.float32), weights, 100.0, True])
    assert [float(term) == 0 for term in got[1][2:]] == [weight == 0 for weight in weights[2:]]


def test_preservation_over_several_chunks_and_blocks():
    assert_op("preservation_loss", [*embeddings(35, 24, torch.bfloat16), WEIGHTS, 100.0, True])


def test_preservation_without_gradient():
    assert_op("preservation_loss", [*embeddings(7, 20, torch.float32), WEIGHTS, 100.0, False])


def test_kept_logits_change_no_bit():
    arguments = [*embeddings(19, 12, torch.bfloat16), WEIGHTS, 100.0, True]
    made_again, kept = (torch.ops.saferclip_fast.preservation_loss_triton(*arguments, mib) for mib in (0.0, 1.0))
    assert all(torch.equal(a, b) for a, b in zip(made_again, kept, strict=True))


@pytest.mark.parametrize("op", ["retarget_loss", "preservation_loss"])
def test_same_bits_each_time(op):
    x = embeddings(9, 40, torch.bfloat16)
    arguments = retarget_arguments(x) if op == "retarget_loss" else [*x, WEIGHTS, 100.0, True]
    function = getattr(torch.ops.saferclip_fast, f"{op}_triton")
    assert all(torch.equal(a, b) for a, b in zip(function(*arguments), function(*arguments), strict=True))
