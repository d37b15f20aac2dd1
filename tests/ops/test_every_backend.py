"""The same properties for every backend: reference, cpu, cuda (on the SIMT executor) and triton (interpreted).

Small shapes, since two of the four are emulated here; each backend's own tests go further. A new backend is one more
entry of BACKENDS.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch

from tests.support.error_rule import check_loss

OPS = torch.ops.saferclip_fast


def registered(suffix: str) -> Callable[[str], Callable]:
    return lambda op: getattr(OPS, op + suffix)


@functools.cache
def executor(op: str) -> Callable:
    """The CUDA source of `op`, run by tests/backends/simt."""
    from tests.backends.simt.executor import NearestSafe, PreservationLoss, RetargetLoss

    if op == "nearest_safe":
        kernel = NearestSafe()

        def search(*arguments):
            found = kernel(*arguments)
            return found.scores, found.indices

        return search
    kernel = {"retarget_loss": RetargetLoss, "preservation_loss": PreservationLoss}[op]()
    return lambda *arguments: kernel(*arguments)[0]


def interpreted(op: str) -> Callable:
    from tests.backends.triton.hardware_interpreter import correct_interpreter

    correct_interpreter()
    return getattr(OPS, f"{op}_triton")


BACKENDS = {"reference": registered("_reference"), "cpu": registered(""), "cuda": executor, "triton": interpreted}


@pytest.fixture(params=list(BACKENDS))
def backend(request):
    return BACKENDS[request.param]


def banks() -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    rows = torch.nn.functional.normalize(torch.randn(70, 24, generator=g), dim=-1)
    cone = torch.nn.functional.normalize(rows + 3 * torch.ones(24) / 24**0.5, dim=-1)
    spike = rows.clone()
    spike[:, 3] = 1e4 * rows[:, 3]
    zeros = rows.clone()
    zeros[::5] = 0
    return {
        "random": rows,
        "cone": cone,
        "duplicates": rows[:7].repeat(10, 1),
        "all equal": rows[:1].repeat(70, 1),
        "near ties": rows[:1] + 1e-7 * rows,
        "one huge element": spike,
        "zero rows": zeros,
        "denormal": rows * 1e-39,
    }


@pytest.mark.parametrize("k", [1, 33])
@pytest.mark.parametrize("name", list(banks()))
def test_search_is_exact(backend, name, k):
    """Equal to the float64 truth, rank by rank, but where two scores agree within one float32 rounding."""
    bank = banks()[name]
    query = 5 * torch.randn(9, 24, generator=torch.Generator().manual_seed(1))
    query[4] = 0
    scores, indices = backend("nearest_safe")(query, bank, k, None)
    unit = query.double() / query.double().norm(dim=1, keepdim=True).clamp(min=1e-300)
    exact = unit @ bank.double().T
    best = exact.sort(dim=1, descending=True, stable=True).values[:, :k]
    # one float32 rounding (2^-149 where scores are denormal), and what float64 sums may differ by
    rounding = 2.0**-23 * best.abs() + 2.0**-149 + 1e-12 * bank.double().norm(dim=1).max()
    assert (scores.double() - best).abs().le(rounding).all()
    assert (exact.gather(1, indices) - best).abs().le(rounding).all()
    assert all(len(set(row)) == k for row in indices.tolist())
    equal = scores[:, 1:] == scores[:, :-1]
    assert (indices[:, 1:] > indices[:, :-1])[equal].all(), "ties go to the lower index"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("k", "current"), [(1, False), (5, True)])
def test_retarget_loss_meets_the_error_rule(backend, dtype, k, current):
    g = torch.Generator().manual_seed(2)
    rows = [torch.randn(11, 40, generator=g).to(dtype) for _ in range(4)]
    bank = [torch.nn.functional.normalize(torch.randn(30, 40, generator=g), dim=-1) for _ in range(2)]
    neighbors = torch.randint(0, 30, (11, k), generator=g)
    weights = torch.softmax(torch.randn(11, k, generator=g), 1)
    options = ([1.0, 0.5, 2.0, 0.25], 4.0, 0.1, current, True)
    tensors = [*rows, *bank, neighbors, weights, torch.rand(11, 4, generator=g)]
    check_loss("retarget_loss", list(backend("retarget_loss")(*tensors, *options)), [*tensors, *options])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [1.0, 100.0])
def test_preservation_loss_meets_the_error_rule(backend, dtype, scale):
    """Rows near their frozen ones, where the gradient of the InfoNCE terms is a small difference."""
    g = torch.Generator().manual_seed(3)
    pair = torch.randn(21, 40, generator=g)
    frozen = [pair + torch.randn(21, 40, generator=g) for _ in range(2)]
    trained = [10 * (x + 0.3 * torch.randn(21, 40, generator=g)) for x in frozen]
    tensors = [t.to(dtype) for t in (*trained, *frozen)]
    options = ([1.0, 0.5, 0.7, 0.3], scale, True)
    check_loss("preservation_loss", list(backend("preservation_loss")(*tensors, *options)), [*tensors, *options])
