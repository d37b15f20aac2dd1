"""Rows of any scale: a loss, its neighbors and a bank do not depend on the lengths of their rows."""

import itertools

import pytest
import torch

import saferclip_fast as sf

G = torch.Generator().manual_seed(0)
ROWS = [torch.randn(5, 16, generator=G, dtype=torch.float64) for _ in range(4)]
BANK = [torch.randn(9, 16, generator=G, dtype=torch.float64) for _ in range(2)]
SCALES = {
    torch.float32: (1e-37, 1e-30, 1e-24, 1e-20, 1.0, 1e18, 1e25, 5e37),
    torch.float64: (1e-300, 1e-200, 1e-160, 1.0, 1e160, 1e300),
}
CASES = [(dtype, scale) for dtype, scales in SCALES.items() for scale in scales]
NATIVE = ["cpu"] if sf.backends()["cpu"].usable else []


def backends(dtype: torch.dtype) -> list[str]:
    return ["reference", *(NATIVE if dtype == torch.float32 else [])]


def scaled(dtype: torch.dtype, scale: float) -> list[torch.Tensor]:
    return [(rows * scale).to(dtype) for rows in ROWS]


@pytest.mark.parametrize(("dtype", "scale"), CASES)
def test_the_same_loss_and_the_gradient_over_the_scale(dtype, scale):
    bank = sf.SafeBank(*BANK)
    for backend, op in itertools.product(backends(dtype), ("preservation_loss", "retarget_loss")):
        found = []
        for rows in (scaled(dtype, scale), scaled(torch.float64, 1.0)):
            leaf = rows[0].requires_grad_()
            own = sf.SafeBank(*(part.to(rows[0].dtype) for part in BANK)) if rows[0].dtype != torch.float64 else bank
            more = () if op == "preservation_loss" else (own,)
            loss = getattr(sf, op)(*rows, *more, backend=backend if dtype == rows[0].dtype else "reference").loss
            (gradient,) = torch.autograd.grad(loss, leaf)
            found.append((loss.detach().double(), gradient.double()))
        (loss, gradient), (wanted, wanted_gradient) = found
        tolerance = 3e-5 if dtype == torch.float32 else 1e-12
        assert abs(loss - wanted) <= tolerance * (1 + abs(wanted))
        if gradient.isfinite().all() and 1e-300 < scale < 1e30:  # else 1/|x| is out of range
            assert torch.allclose(gradient * scale, wanted_gradient, rtol=10 * tolerance, atol=tolerance)


@pytest.mark.parametrize(("dtype", "scale"), CASES)
def test_the_same_neighbors(dtype, scale):
    bank = sf.SafeBank(*(part.to(dtype) for part in BANK))
    wanted = sf.nearest_safe(scaled(dtype, 1.0)[0], bank, 3, backend="reference")
    for backend in backends(dtype):
        found = sf.nearest_safe(scaled(dtype, scale)[0], bank, 3, backend=backend)
        assert torch.equal(found.indices, wanted.indices) and torch.allclose(found.scores, wanted.scores, atol=1e-6)


@pytest.mark.parametrize(("dtype", "scale"), CASES)
def test_a_bank_has_unit_rows(dtype, scale):
    bank = sf.SafeBank(*((part * scale).to(dtype) for part in BANK))
    for rows, wanted in ((bank.text, BANK[0]), (bank.image, BANK[1])):
        assert torch.allclose(rows.double(), torch.nn.functional.normalize(wanted, dim=-1), atol=1e-6)
    assert sf.SafeBank(torch.full((2, 8), 3e37), torch.full((2, 8), 3e37)).text.eq(8**-0.5).all()


@pytest.mark.parametrize("scale", [0.0, 1e-24, 1e25])
def test_a_row_of_zeros_has_no_gradient_and_disturbs_no_other(scale):
    rows = scaled(torch.float32, scale)
    rows[0] = ROWS[0].float()
    rows[0][2] = 0
    leaf = rows[0].requires_grad_()
    (gradient,) = torch.autograd.grad(sf.preservation_loss(*rows, backend="reference").loss, leaf)
    assert gradient.isfinite().all() and gradient[2].eq(0).all()


@pytest.mark.parametrize("backend", ["reference", *NATIVE])
def test_a_loss_scale_beyond_float16(backend):
    """GradScaler starts at 65,536, which is no float16: the gradients are scaled before they are rounded."""
    rows = [part.half() for part in ROWS]
    leaf = rows[0].requires_grad_()
    loss = sf.preservation_loss(*rows, logit_scale=1.0, backend=backend).loss
    (expected,) = torch.autograd.grad(loss, leaf, retain_graph=True)
    (found,) = torch.autograd.grad(65_536 * loss, leaf)
    torch.testing.assert_close(found, (65_536 * expected.float()).half(), rtol=0, atol=0)
