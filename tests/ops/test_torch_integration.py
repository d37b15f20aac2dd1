"""The ops inside PyTorch: opcheck, torch.compile, autocast, no_grad, second derivatives, every registered backend."""

import pytest
import torch

import saferclip_fast as sf
from saferclip_fast.ops import schemas

OPS = torch.ops.saferclip_fast
B, D, N, K = 6, 16, 30, 3


def native_and_reference(op):
    names = [f"{op}_reference"]
    if op in sf.backends()["cpu"].ops:
        names.append(op)
    return names


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(1)

    def rows(n):
        return torch.randn(n, D, generator=generator)

    bank = sf.SafeBank(rows(N), rows(N))
    return rows(B).requires_grad_(), rows(B).requires_grad_(), rows(B), rows(B), bank


def arguments(op, batch):
    text, image, frozen_text, frozen_image, bank = batch
    if op == "nearest_safe":
        return frozen_text, bank.text, K
    if op == "preservation_loss":
        return text, image, frozen_text, frozen_image, [1.0, 2.0, 3.0, 0.5], 20.0, True
    mask = torch.tensor([1, 0, 1, 1, 0, 1], dtype=torch.bool)
    if op == "info_nce_sums":
        return text[:4].detach(), frozen_image, None, 1, 20.0, True  # with a mask, the end of the logits is not filled
    if op == "info_nce_loss":
        sums = torch.randn(3, 4, generator=torch.Generator().manual_seed(2)), torch.ones(2, B)
        return text[:4], frozen_image, mask, *sums, torch.empty(0, B), 1, 20.0, True
    found = sf.nearest_safe(frozen_text, bank, K)
    if op == "neighbor_hinge":
        return (
            text,
            torch.cat([bank.image, bank.text[:, :2]], 1),
            found.indices,
            found.scores,
            torch.ones(B),
            0.1,
            K,
            True,
        )
    row_weights = torch.full((B, 4), 1 / B)
    weights = torch.softmax(found.scores, 1)
    shared = (text, image, frozen_text, frozen_image, bank.text, bank.image, found.indices, weights, row_weights)
    return *shared, [1.0, 2.0, 3.0, 0.5], 2.0, 0.1, False, True


@pytest.mark.parametrize("op", list(schemas.SCHEMAS))
def test_opcheck(op, batch):
    for name in native_and_reference(op):
        torch.library.opcheck(getattr(OPS, name).default, arguments(op, batch))


def test_the_native_schemas_are_those_of_python():
    for op, schema in schemas.SCHEMAS.items():
        if op in sf.backends()["cpu"].ops:
            assert str(getattr(OPS, op).default._schema) == f"saferclip_fast::{op}{schema}"


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_fullgraph(batch, dynamic):
    text, image, frozen_text, frozen_image, bank = batch

    def loss(t, v, k):
        redirect = sf.retarget_loss(t, v, frozen_text, frozen_image, bank, k=k, negative="current")
        preserve = sf.preservation_loss(t, v, frozen_text, frozen_image)
        contrast = sf.info_nce(t, v, mask=frozen_text[:, 0] > 0)
        return redirect.loss + preserve.loss + contrast + redirect.terms["uni_text"]

    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for k in (1, K):
        expected = torch.autograd.grad(loss(text, image, k), (text, image))
        torch.testing.assert_close(torch.autograd.grad(compiled(text, image, k), (text, image)), expected)
    search = torch.compile(sf.nearest_safe, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(search(frozen_text, bank, K), sf.nearest_safe(frozen_text, bank, K))


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_autocast_changes_nothing(batch, backend):
    text, image, frozen_text, frozen_image, bank = batch

    def losses():
        return (
            sf.retarget_loss(text, image, frozen_text, frozen_image, bank, K, backend=backend).loss,
            sf.preservation_loss(text, image, frozen_text, frozen_image, backend=backend).loss,
        )

    expected = losses()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = losses()
    assert all(torch.equal(a, b) for a, b in zip(expected, inside, strict=True))


def test_no_grad_computes_no_gradient(batch):
    args = arguments("preservation_loss", batch)
    for name in native_and_reference("preservation_loss"):
        _, _, grad_text, grad_image = getattr(OPS, name)(*args[:-1], False)
        assert grad_text.shape == grad_image.shape == (0, D)
    with torch.no_grad():
        assert not sf.retarget_loss(*batch).loss.requires_grad


def test_a_backward_pass_allocates_nothing_but_the_gradients():
    """Zeros for outputs that nothing was derived from would cost more than the op."""
    rows, width = 512, 256
    text, image, frozen_text, frozen_image = (torch.randn(rows, width) for _ in range(4))
    trained = text.requires_grad_(), image.requires_grad_()
    bank = sf.SafeBank(torch.randn(8, width), torch.randn(8, width))
    neighbors = sf.nearest_safe(frozen_text, bank)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        loss = sf.retarget_loss(*trained, frozen_text, frozen_image, bank, neighbors=neighbors, check=False).loss
        torch.autograd.grad(loss, trained)
    allocated = sum(max(0, event.self_cpu_memory_usage) for event in profiler.events())
    assert allocated < 2.5 * text.nbytes


def test_gradients_scale_with_the_incoming_one(batch):
    text, image = batch[:2]
    once = torch.autograd.grad(sf.retarget_loss(*batch).loss, (text, image))
    tripled = torch.autograd.grad(3 * sf.retarget_loss(*batch).loss, (text, image))
    torch.testing.assert_close(tripled, tuple(3 * g for g in once))


def test_second_derivative_is_refused(batch):
    with pytest.raises(RuntimeError, match="create_graph=True"):
        torch.autograd.grad(sf.retarget_loss(*batch).loss, batch[0], create_graph=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_half_precision_rows(batch, dtype, backend):
    text, image, frozen_text, frozen_image, bank = batch
    half = [x.detach().to(dtype).requires_grad_() for x in (text, image)]
    out = sf.retarget_loss(*half, frozen_text, frozen_image, bank, K, backend=backend)
    assert out.loss.dtype == torch.float32
    out.loss.backward()
    wide = [x.detach().float().requires_grad_() for x in half]
    sf.retarget_loss(*wide, frozen_text, frozen_image, bank, K, backend="reference").loss.backward()
    for a, b in zip(half, wide, strict=True):
        assert a.grad.dtype == dtype
        torch.testing.assert_close(a.grad.float(), b.grad, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)


def test_backends_say_why():
    found = sf.backends()
    assert set(found) == {"reference", "cpu", "cuda", "triton"}
    assert found["reference"].usable
    assert all(row.detail for row in found.values())
