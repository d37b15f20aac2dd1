"""Derivatives and transforms of the public ops: each gives the right value, or refuses by name."""

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from torch.utils.checkpoint import checkpoint

import saferclip_fast as sf
from saferclip_fast.ops import Neighbors, neighbor_hinge

BACKENDS = [name for name, row in sf.backends().items() if row.usable and name in ("reference", "cpu")]
G = torch.Generator().manual_seed(0)
TEXT, IMAGE, OTHER_TEXT, OTHER_IMAGE = (torch.randn(6, 8, generator=G) for _ in range(4))
BANK = sf.SafeBank(torch.randn(10, 8, generator=G), torch.randn(10, 8, generator=G))
GUARD = torch.nn.functional.normalize(torch.randn(12, 10, generator=G), dim=1)
SCORES, INDICES = torch.randn(6, 3, generator=G), torch.randint(12, (6, 3), generator=G)
LOSSES = {
    "preservation_loss": lambda x, backend, **check: (
        sf.preservation_loss(x, IMAGE, OTHER_TEXT, OTHER_IMAGE, backend=backend, **check).loss
    ),
    "retarget_loss": lambda x, backend, **check: (
        sf.retarget_loss(x, IMAGE, OTHER_TEXT, OTHER_IMAGE, BANK, backend=backend, **check).loss
    ),
    "info_nce": lambda x, backend, **check: sf.info_nce(x, OTHER_IMAGE, backend=backend, **check),
    "neighbor_hinge": lambda x, backend: (
        neighbor_hinge(x, GUARD, Neighbors(SCORES, INDICES), torch.ones(6) / 6, margin=0.1, k=3, backend=backend).loss
    ),
}


@pytest.fixture(params=LOSSES)
def op(request):
    return request.param


@pytest.fixture(params=BACKENDS)
def loss(request, op):
    return lambda x: LOSSES[op](x, request.param)


def plain_gradient(loss):
    x = TEXT.clone().requires_grad_()
    loss(x).backward()
    return x.grad


def test_a_gradient_that_is_written_to_does_not_change_the_next_one(loss):
    """backward(retain_graph=True) twice, with a change of x.grad between."""
    x = TEXT.clone().requires_grad_()
    value = loss(x)
    value.backward(retain_graph=True)
    x.grad.mul_(0.1)
    value.backward()
    assert torch.allclose(x.grad, 1.1 * plain_gradient(loss), rtol=1e-6)


def test_a_gradient_is_a_value_not_a_graph(loss):
    """Sums of gradients over steps must not keep the graphs of all of them."""
    x = TEXT.clone().requires_grad_()
    (found,) = torch.autograd.grad(loss(x), x)
    assert not found.requires_grad and found.grad_fn is None


def test_inside_a_checkpoint(loss):
    """A loss whose forward pass is run again in the backward pass."""
    x = TEXT.clone().requires_grad_()
    checkpoint(loss, x, use_reentrant=False).backward()
    assert torch.equal(x.grad, plain_gradient(loss))


def test_a_batch_of_outer_gradients(loss):
    x = TEXT.clone().requires_grad_()
    (found,) = torch.autograd.grad(loss(x), x, torch.tensor([1.0, 2.0, -3.0]), is_grads_batched=True)
    assert torch.allclose(found, torch.tensor([1.0, 2.0, -3.0]).view(3, 1, 1) * plain_gradient(loss), rtol=1e-6)


def test_the_jacobian_of_a_chain(loss):
    found = torch.autograd.functional.jacobian(lambda x: loss(2 * x), TEXT)
    assert torch.allclose(found, plain_gradient(loss), rtol=1e-5)  # the loss does not see the scale, 2 x half the slope


@pytest.mark.parametrize("check", [True, False])
@pytest.mark.parametrize(
    "transform",
    [
        lambda loss: torch.func.grad(loss)(TEXT),
        lambda loss: torch.func.jvp(loss, (TEXT,), (TEXT,)),
        lambda loss: torch.func.hessian(loss)(TEXT),
        lambda loss: torch.func.vmap(loss)(torch.stack([TEXT, TEXT])),
    ],
    ids=["grad", "jvp", "hessian", "vmap"],
)
def test_transforms_of_torch_func_are_refused_by_name(op, transform, check):
    """Forward mode would have given a tangent of zero, and no word."""

    def loss(x):
        return LOSSES[op](x, "auto", **({} if op == "neighbor_hinge" else {"check": check}))

    with pytest.raises(RuntimeError, match=rf"^{op} does not go through .*: use loss.backward\(\)"):
        transform(loss)


def test_forward_mode_is_refused_by_name(op, loss):
    with (
        forward_ad.dual_level(),
        pytest.raises(RuntimeError, match=f"{op} does not go through forward-mode differentiation"),
    ):
        loss(forward_ad.make_dual(TEXT, torch.ones_like(TEXT)))


def test_a_second_derivative_is_refused_by_name(loss):
    x = TEXT.clone().requires_grad_()
    with pytest.raises(RuntimeError, match="losses have no second derivative"):
        torch.autograd.grad(loss(x), x, create_graph=True)


def test_a_search_is_a_constant_for_derivatives_and_takes_no_vmap():
    assert torch.func.grad(lambda x: sf.nearest_safe(x, BANK).scores.sum() + x.sum())(TEXT).eq(1).all()
    with pytest.raises(RuntimeError, match=r"nearest_safe does not go through torch.func.vmap: give all rows at once"):
        torch.func.vmap(lambda x: sf.nearest_safe(x, BANK).scores)(torch.stack([TEXT, TEXT]))
