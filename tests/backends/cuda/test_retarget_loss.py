"""Gate 1 for retarget_loss: the .cu source runs on the SIMT executor; its error is compared, not guessed."""

import pytest
import torch
import torch.nn.functional as F

from tests.backends.simt import executor as simt
from tests.support.error_rule import check_loss

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16


@pytest.fixture(scope="module")
def kernels() -> simt.RetargetLoss:
    return simt.RetargetLoss()


def problem(batch, dim, k, dtype, frozen=None, bank=None, rows=37, seed=0):
    """The nine tensors of the op, in the order of its schema."""
    g = torch.Generator().manual_seed(seed)
    scale = 10.0 ** torch.linspace(-2, 2, batch)[:, None]
    text, image = (torch.randn(batch, dim, generator=g).mul(scale).to(dtype) for _ in range(2))
    frozen_text, frozen_image = (torch.randn(batch, dim, generator=g).to(frozen or dtype) for _ in range(2))
    banks = [F.normalize(torch.randn(rows, dim, generator=g), dim=-1).to(bank or FP32) for _ in range(2)]
    neighbors = torch.randint(rows, (batch, k), generator=g)
    neighbor_weights = torch.rand(batch, k, generator=g).softmax(1)
    row_weights = torch.rand(batch, 4, generator=g) / batch
    return [text, image, frozen_text, frozen_image, *banks, neighbors, neighbor_weights, row_weights]


def check(kernels, tensors, *options):
    found, counters = kernels(*tensors, *options)
    check_loss("retarget_loss", found, [*tensors, *options])
    return found, counters


@pytest.mark.parametrize(
    ("batch", "dim", "k", "dtype", "frozen", "bank"),
    [
        (1, 64, 1, FP32, FP32, FP32),
        (5, 72, 5, BF16, BF16, FP32),
        (7, 100, 32, FP16, FP32, BF16),
        (3, 129, 100, FP32, BF16, FP16),
        (6, 513, 2, BF16, BF16, BF16),
        (9, 1024, 5, FP16, FP16, FP32),
        (4, 768, 1, FP32, FP32, FP32),
        (2, 7, 3, FP16, FP16, FP16),
    ],
)
@pytest.mark.parametrize("current_negative", [False, True])
def test_against_the_reference(kernels, batch, dim, k, dtype, frozen, bank, current_negative):
    tensors = problem(batch, dim, k, dtype, frozen, bank)
    check(kernels, tensors, [1.0, 0.7, 2.0, 0.3], 1.0, 0.0, current_negative, True)


@pytest.mark.parametrize(("beta", "margin"), [(10.0, 0.2), (0.5, -0.3), (2000.0, 0.0)])
def test_beta_and_margin(kernels, beta, margin):
    check(kernels, problem(6, 96, 3, FP32), [1.0, 1.0, 1.0, 1.0], beta, margin, False, True)


def test_without_gradients(kernels):
    found, _ = check(kernels, problem(5, 64, 2, FP32), [1.0, 0.0, 1.0, 0.0], 1.0, 0.0, False, False)
    assert found[2].shape == found[3].shape == (0, 64)


def test_zero_rows(kernels):
    tensors = problem(4, 64, 2, FP32)
    tensors[0][1], tensors[1][2], tensors[2][3], tensors[3][0] = 0, 0, 0, 0
    for current in (False, True):
        found, _ = check(kernels, tensors, [1.0, 1.0, 1.0, 1.0], 1.0, 0.0, current, True)
        assert found[0].isfinite()
        assert (found[2][1] == 0).all()
        assert (found[3][2] == 0).all()


def test_neighbor_outside_the_bank(kernels):
    """Nothing is read out of bounds, and the mistake shows as NaN in its own row."""
    tensors = problem(3, 64, 2, FP32)
    tensors[6][1, 1] = 37
    found, _ = kernels(*tensors, [1.0, 1.0, 1.0, 1.0], 1.0, 0.0, False, True)
    assert found[0].isnan()
    assert found[2].isnan().any(1).tolist() == [False, True, False]


def test_more_rows_than_the_reduction_has_threads(kernels):
    check(kernels, problem(1031, 8, 2, FP32), [1.0, 1.0, 1.0, 1.0], 1.0, 0.0, False, True)


def test_unaligned_gradient_rows(kernels):
    """Text that starts off a 16-byte boundary takes the scalar loads and stores."""
    tensors = problem(3, 64, 1, BF16)
    for i in range(2):
        shifted = torch.empty(3 * 64 + 1, dtype=BF16)
        shifted[1:] = tensors[i].flatten()
        tensors[i] = shifted[1:].view(3, 64)
    check(kernels, tensors, [1.0, 1.0, 1.0, 1.0], 1.0, 0.0, False, True)


@pytest.mark.parametrize("current", [False, True])
@pytest.mark.parametrize("scale", [1e-37, 1e-23, 1e18, 1e35])
def test_rows_of_any_scale(kernels, scale, current):
    """Each of text, image and their frozen selves has such rows beside ordinary ones."""
    tensors = problem(9, 40, 2, FP32)
    for i, tensor in enumerate(tensors[:4]):
        tensor[i::4] *= scale
    check(kernels, tensors, [1.0, 0.7, 2.0, 0.3], 1.0, 0.0, current, True)
