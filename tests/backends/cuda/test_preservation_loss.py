"""Gate 1 for preservation_loss: the .cu source runs on the SIMT executor; its error is compared, not guessed."""

import pytest
import torch

from tests.backends.simt import executor as simt
from tests.support.error_rule import check_loss

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
WEIGHTS = [1.0, 0.5, 0.7, 0.3]


@pytest.fixture(scope="module")
def kernels() -> simt.PreservationLoss:
    return simt.PreservationLoss()


def problem(batch, dim, dtype, frozen=None, seed=0):
    """The four tensors of the op: trained rows near their frozen ones, pairs that match, rows of any scale."""
    g = torch.Generator().manual_seed(seed)
    pair = torch.randn(batch, dim, generator=g)
    frozen_text, frozen_image = (pair + torch.randn(batch, dim, generator=g) for _ in range(2))
    scale = 10.0 ** torch.linspace(-2, 2, batch)[:, None]
    text, image = (scale * (x + 0.3 * torch.randn(batch, dim, generator=g)) for x in (frozen_text, frozen_image))
    return [text.to(dtype), image.to(dtype), frozen_text.to(frozen or dtype), frozen_image.to(frozen or dtype)]


def check(kernels, tensors, *options):
    found, counters = kernels(*tensors, *options)
    check_loss("preservation_loss", found, [*tensors, *options])
    return found, counters


@pytest.mark.parametrize(
    ("batch", "dim", "dtype", "frozen"),
    [
        (1, 64, FP32, FP32),
        (7, 72, BF16, BF16),
        (131, 64, FP16, FP16),
        (200, 104, BF16, BF16),
        (130, 100, FP32, FP32),
        (33, 129, FP16, FP16),
        (5, 67, BF16, FP32),
        (40, 768, FP32, FP32),
        (9, 1024, FP16, FP16),
    ],
)
def test_against_the_reference(kernels, batch, dim, dtype, frozen):
    check(kernels, problem(batch, dim, dtype, frozen), WEIGHTS, 100.0, True)


@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("multiprocessors", [1, 4])
def test_flat_logits(kernels, dtype, multiprocessors):
    """At a low logit scale every column counts, and so would one past the end; in one split or several."""
    kernels.multiprocessors = multiprocessors
    try:
        check(kernels, problem(141, 64, dtype), WEIGHTS, 1.0, True)
    finally:
        kernels.multiprocessors = 2


@pytest.mark.parametrize("weights", [[1.0, 1.0, 0.0, 0.5], [0.0, 1.0, 0.5, 0.0], [1.0, 1.0, 0.0, 0.0]])
def test_terms_that_are_off(kernels, weights):
    found, counters = check(kernels, problem(12, 64, BF16), weights, 100.0, True)
    assert (found[1][2:] == 0).tolist() == [w == 0 for w in weights[2:]]
    if weights[2:] == [0.0, 0.0]:
        assert counters["mma"] == 0


def test_gradients_in_slices(kernels):
    """A batch whose weights don't fit the workspace at once gives the same bits."""
    tensors = problem(200, 64, BF16)
    whole, _ = kernels(*tensors, WEIGHTS, 100.0, True)
    kernels.slice_bytes = 1
    try:
        sliced, _ = kernels(*tensors, WEIGHTS, 100.0, True)
    finally:
        del kernels.slice_bytes
    assert all(a.equal(b) for a, b in zip(whole, sliced, strict=True))


def test_without_gradients(kernels):
    found, _ = check(kernels, problem(20, 64, FP32), WEIGHTS, 100.0, False)
    assert found[2].shape == found[3].shape == (0, 64)


def test_far_logits(kernels):
    """Rows whose best logit is far below the largest possible one: no lse may underflow."""
    tensors = problem(10, 64, FP32)
    tensors[3] = -tensors[3]
    found, _ = check(kernels, tensors, WEIGHTS, 1000.0, True)
    assert all(f.isfinite().all() for f in found)


def test_zero_rows(kernels):
    tensors = problem(6, 64, FP32)
    tensors[0][1], tensors[1][2], tensors[2][3], tensors[3][4] = 0, 0, 0, 0
    found, _ = check(kernels, tensors, WEIGHTS, 100.0, True)
    assert (found[2][1] == 0).all()
    assert (found[3][2] == 0).all()


@pytest.mark.parametrize("scale", [1e-37, 1e-23, 1e18, 1e35])
def test_rows_of_any_scale(kernels, scale):
    """Each of the four inputs has such rows beside ordinary ones."""
    tensors = problem(13, 40, FP32)
    for i, tensor in enumerate(tensors):
        tensor[i::4] *= scale
    check(kernels, tensors, WEIGHTS, 100.0, True)
