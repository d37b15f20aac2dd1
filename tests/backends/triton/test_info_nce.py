"""info_nce_sums and info_nce_loss: the rule of tests/ops/test_info_nce.py, in shares, masked, over several chunks."""

import pytest
import torch

import saferclip_fast as sf
from saferclip_fast.ops.triton import info_nce
from tests.ops.test_info_nce import check, in_parts, ops_of, problem

from .device import DEVICE, DTYPES

OPS = torch.ops.saferclip_fast


def run(op, *arguments):
    """The torch op; tensors go to its device and come back."""
    found = getattr(OPS, f"{op}_triton")(*(a.to(DEVICE) if isinstance(a, torch.Tensor) else a for a in arguments))
    return tuple(x.cpu() for x in found)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("batch", "width", "parts", "masked", "keep"), [(1, 2, 1, False, True), (19, 10, 2, True, False)]
)
def test_error_of_each_row(batch, width, parts, masked, keep, dtype):
    x, y, mask = problem(batch, width, dtype)
    check(ops_of(run), x, y, mask if masked else None, 100.0, parts=parts, keep=keep)


@pytest.mark.parametrize("scale", [-3.0, 0.5])
def test_flat_logits_over_chunks_and_blocks_of_columns(scale):
    """Every entry counts, so one too many or too few would show."""
    x, y, mask = problem(37, 6, torch.float32)
    check(ops_of(run), x, y, mask if scale > 0 else None, scale, parts=1, keep=scale > 0)


def test_ties_of_large_logits():
    """Equal rows: each softmax is uniform over them, at logits of 100."""
    x, y, _ = problem(6, 8, torch.float32, zeros=False)
    check(ops_of(run), x[[0, 0, 0, 1, 1, 2]], y[[0, 0, 0, 1, 1, 2]], None, 100.0, parts=2)


def test_logits_at_both_ends():
    """Half the rows match at +1, half are opposite at -1: a common offset would underflow for half of them."""
    x, _, _ = problem(10, 8, torch.float32, zeros=False)
    y = x * torch.where(torch.arange(10) % 2 == 0, 1.0, -1.0).unsqueeze(1)
    check(ops_of(run), x, y, None, 100.0, parts=2)


def test_rows_of_any_scale():
    x, y, _ = problem(8, 6, torch.float32, zeros=False)
    loss, grad = in_parts(ops_of(run), x, y, None, 20.0)
    far = torch.logspace(-30, 30, 8).unsqueeze(1)
    far_loss, far_grad = in_parts(ops_of(run), x * far, y * far.flip(0), None, 20.0)
    torch.testing.assert_close(far_loss, loss)
    torch.testing.assert_close((far_grad.double() * far).float(), grad, rtol=1e-4, atol=1e-6)


def test_a_process_without_chosen_rows_and_a_mask_of_none():
    x, y, _ = problem(6, 5, torch.float32)
    check(ops_of(run), x, y, torch.arange(6) < 2, 100.0, parts=3)
    loss, grad = in_parts(ops_of(run), x, y, torch.zeros(6, dtype=torch.bool), 100.0, parts=2)
    assert loss == 0 and not grad.any()


def test_kept_logits_change_no_bit():
    x, y, mask = problem(18, 7, torch.bfloat16)
    made_again, kept = (in_parts(ops_of(run), x, y, mask, 100.0, keep=keep) for keep in (False, True))
    assert all(torch.equal(a, b) for a, b in zip(made_again, kept, strict=True))


@pytest.mark.parametrize("trained", ["x", "y", "both"])
def test_gradients_of_either_side(trained):
    x, y, mask = (tensor.to(DEVICE) for tensor in problem(7, 6, torch.float32, zeros=False))
    found, expected = [], []
    for backend, gradients in (("triton", found), ("reference", expected)):
        wide = torch.float64 if backend == "reference" else torch.float32
        sides = [side.to(wide).requires_grad_(trained in (name, "both")) for name, side in (("x", x), ("y", y))]
        loss = sf.info_nce(*sides, mask=mask, logit_scale=20.0, backend=backend)
        gradients += [loss.detach(), *torch.autograd.grad(loss, [side for side in sides if side.requires_grad])]
    for f, e in zip(found, expected, strict=True):
        torch.testing.assert_close(f.double(), e, rtol=2e-5, atol=2e-6)


def test_opcheck():
    x, y, mask = (tensor.to(DEVICE) for tensor in problem(4, 5, torch.float32))
    rows, columns, logits = OPS.info_nce_sums_triton(x, y, mask, 0, 10.0, True)
    torch.library.opcheck(OPS.info_nce_sums_triton.default, (x, y, mask, 0, 10.0, True))
    arguments = (x.requires_grad_(), y, mask, rows, columns, logits, 0, 10.0, True)
    torch.library.opcheck(OPS.info_nce_loss_triton.default, arguments)


@pytest.mark.parametrize(("columns", "expected"), [(4096, 1536), (16_384, 384), (65_536, 1024), (10**6, 256)])
def test_a_chunk_fills_half_the_cache_or_what_memory_gives_in_whole_tiles(columns, expected, monkeypatch):
    class H100:
        L2_cache_size = 50 << 20

    class OnAGpu:
        is_cuda, device = True, None

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: H100)
    assert info_nce.chunk_rows(OnAGpu(), columns) == expected
