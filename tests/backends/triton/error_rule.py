"""The project's error rule, and the device that the kernels run on in these tests."""

import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def assert_error_rule(got, plain, truth, name=""):
    """max |got - truth| is at most twice that of plain PyTorch in the same dtype, plus one rounding unit."""
    if truth.numel() == 0:
        assert got.shape == truth.shape
        return
    got, plain, truth = got.detach().cpu(), plain.detach().cpu(), truth.detach().cpu().double()
    assert got.shape == truth.shape and got.dtype == plain.dtype and torch.isfinite(got).all(), name
    error, allowed = (got.double() - truth).abs().max(), (plain.double() - truth).abs().max()
    unit = torch.finfo(got.dtype).eps * truth.abs().max()
    assert error <= 2 * allowed + unit, f"{name}: error {error:.3e}, plain PyTorch {allowed:.3e}, unit {unit:.3e}"


def wide(arguments):
    """The same arguments in float64."""
    return [a.double() if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in arguments]
