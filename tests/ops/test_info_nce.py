"""info_nce on every backend: against plain PyTorch in float64, in parts, with masks; each row's error by itself."""

from __future__ import annotations

import threading

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import saferclip_fast as sf
from saferclip_fast.ops import reference
from tests.ops.variants import threads, variants

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
VARIANTS = pytest.mark.parametrize("run", variants("info_nce_sums"), ids=str)


def plain(x, y, mask, scale):
    """Two cross entropies of normalized rows, as CLIP trains."""
    x, y = F.normalize(x, dim=-1), F.normalize(y, dim=-1)
    x, y = (x, y) if mask is None else (x[mask], y[mask])
    logits, label = scale * x @ y.T, torch.arange(len(x))
    return (F.cross_entropy(logits, label) + F.cross_entropy(logits.T, label)) / 2


def problem(batch, d, dtype, seed=0, zeros=True):
    """Counterparts that are alike, of lengths 0.1 to 10, a zero row on each side; half of the rows chosen."""
    g = torch.Generator().manual_seed(seed)
    lengths = torch.logspace(-1, 1, batch).unsqueeze(1)
    x = torch.randn(batch, d, generator=g)
    y = (x + torch.randn(batch, d, generator=g)) * lengths.flip(0)
    x = x * lengths
    if zeros and batch > 2:
        x[batch // 2] = 0
        y[batch // 3] = 0
    mask = torch.rand(batch, generator=g) < 0.5
    mask[0] = True
    return x.to(dtype), y.to(dtype), mask


def cut(batch, parts):
    return [slice(batch * p // parts, batch * (p + 1) // parts) for p in range(parts)]


def in_parts(ops, x, y, mask, scale, parts=1, keep=False):
    """The loss and its gradient as processes with a part of the rows each compute them."""
    sums, loss = ops
    owners = cut(len(x), parts)
    found = [sums(x[own], y, mask, own.start, scale, keep) for own in owners]
    largest = torch.stack([columns[0] for _, columns, _ in found]).amax(0)
    total = sum(columns[1] * (columns[0] - largest).exp() for _, columns, _ in found)
    columns = torch.stack([largest, total.log()])
    out = [
        loss(x[own], y, mask, rows, columns, logits, own.start, scale, True)
        for own, (rows, _, logits) in zip(owners, found, strict=True)
    ]
    return sum(part[0] for part in out), torch.cat([part[1] for part in out])


def ops_of(run):
    return (lambda *args: run("info_nce_sums", *args)), (lambda *args: run("info_nce_loss", *args))


def loss_and_gradient(x, y, mask, scale):
    x = x.clone().requires_grad_()
    loss = plain(x, y, mask, scale)
    return loss.detach(), torch.autograd.grad(loss, x)[0]


def plain_errors(x, y, mask, scale, truth, expected):
    """The largest |error| |x| of a row of the gradient and the largest error of the loss: of a few rows one order of
    the products may get all right by luck."""
    g = torch.Generator().manual_seed(9)
    alive, row_errors, loss_errors = x.any(1), [], []
    for _ in range(4):
        order = torch.randperm(x.shape[1], generator=g)
        loss, grad = loss_and_gradient(x[:, order], y[:, order], mask, scale)
        row_errors.append(((grad.double() - expected[:, order]).norm(dim=1) * x.double().norm(dim=1))[alive].max())
        loss_errors.append((loss - truth).abs())
    return max(row_errors), max(loss_errors)


def check(ops, x, y, mask, scale, **how):
    """The loss and every row of the gradient, in units of 1 / |x|, which it has as a factor.

    Allowed are twice the error of plain float32 on its worst row, a rounding of the row itself, and one of scale / n,
    the size of the counterpart that is subtracted from a row. For the loss, one of a logit.
    """
    truth, expected = loss_and_gradient(x.double(), y.double(), mask, scale)
    loss, grad = in_parts(ops, x, y, mask, scale, **how)
    assert grad.dtype == x.dtype and loss.dtype == torch.float32
    length = x.double().norm(dim=1)
    alive = length > 0
    assert not grad[~alive].any()
    if mask is not None:
        assert not grad[~mask].any()
    errors = ((grad.double() - expected).norm(dim=1) * length)[alive]
    rough, rough_loss = plain_errors(x.float(), y.float(), mask, scale, truth, expected)
    sizes = (expected.norm(dim=1) * length)[alive]
    subtracted = abs(scale) / (len(x) if mask is None else int(mask.sum()))
    kind = torch.finfo(x.dtype)
    denormal = kind.smallest_normal * kind.eps * x.shape[1] ** 0.5 * length[alive]
    allowed = 2 * rough + kind.eps * sizes + denormal + torch.finfo(torch.float32).eps * subtracted
    assert (errors <= allowed).all(), (errors / allowed).max()
    assert (loss - truth).abs() <= 2 * rough_loss + torch.finfo(torch.float32).eps * abs(scale)


@VARIANTS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("keep", [False, True])
def test_error_of_each_row(run, dtype, masked, keep):
    for batch, d, parts in ((1, 2, 1), (2, 3, 2), (17, 16, 3), (300, 40, 1), (523, 64, 2)):
        x, y, mask = problem(batch, d, dtype)
        check(ops_of(run), x, y, mask if masked else None, 100.0, parts=parts, keep=keep)


@VARIANTS
@settings(max_examples=30, deadline=None, derandomize=True)
@given(data=st.data())
def test_random_shapes(run, data):
    batch, d = data.draw(st.integers(2, 90)), data.draw(st.integers(2, 70))
    x, y, mask = problem(batch, d, data.draw(st.sampled_from(DTYPES)), data.draw(st.integers(0, 99)))
    how = {"parts": data.draw(st.integers(1, min(batch, 4))), "keep": data.draw(st.booleans())}
    check(
        ops_of(run),
        x,
        y,
        data.draw(st.sampled_from([None, mask])),
        data.draw(st.sampled_from([-3.0, 0.5, 20.0, 100.0])),
        **how,
    )


@VARIANTS
def test_kept_logits_threads_and_other_cuts_change_no_bit_they_should_not(run):
    x, y, mask = problem(700, 50, torch.float32)
    for chosen in (None, mask):
        whole = in_parts(ops_of(run), x, y, chosen, 100.0)
        kept = in_parts(ops_of(run), x, y, chosen, 100.0, keep=True)
        assert all(torch.equal(a, b) for a, b in zip(whole, kept, strict=True))
        for count in (2, 7):
            with threads(count):
                again = in_parts(ops_of(run), x, y, chosen, 100.0, keep=True)
            assert all(torch.equal(a, b) for a, b in zip(whole, again, strict=True))


@VARIANTS
def test_logits_keep_their_bits_when_the_sides_change_roles(run):
    """Or 1 - softmax of a row that is sure of its counterpart would be noise in one of both gradients."""
    x, y, mask = problem(300, 70, torch.float32)
    for scale in (100.0, -3.0):
        rows, columns, logits = run("info_nce_sums", x, y, mask, 0, scale, True)
        back = run("info_nce_sums", y, x, mask, 0, scale, True)
        assert (
            torch.equal(rows[2], back[0][2])
            and torch.equal(rows[0], back[1][0])
            and torch.equal(columns[0], back[0][0])
        )


@VARIANTS
def test_far_apart_logits(run):
    """Half the rows match at +1, half are opposite at -1: exp of a common offset would underflow for half of them."""
    x = F.normalize(torch.randn(300, 32, generator=torch.Generator().manual_seed(0)), dim=1)
    y = x * torch.where(torch.arange(300) % 2 == 0, 1.0, -1.0).unsqueeze(1)
    check(ops_of(run), x, y, None, 100.0, parts=3)


@VARIANTS
def test_a_process_without_chosen_rows_and_a_mask_of_none(run):
    x, y, _ = problem(12, 16, torch.float32)
    check(ops_of(run), x, y, torch.arange(12) < 3, 100.0, parts=3)
    loss, grad = in_parts(ops_of(run), x, y, torch.zeros(12, dtype=torch.bool), 100.0, parts=2)
    assert loss == 0 and not grad.any()


class Together:
    """Threads in place of processes: what `info_nce` wants of an exchange."""

    def __init__(self, parts):
        self.parts, self.barrier, self.told = parts, threading.Barrier(parts), {}
        self.local = threading.local()

    def all(self, value):
        self.told[self.local.part] = value.detach().clone()
        self.barrier.wait(30)
        values = [self.told[part] for part in range(self.parts)]
        self.barrier.wait(30)
        return values

    def sum(self, value):
        return torch.stack(self.all(value)).sum(0)

    def maximum(self, value):
        return torch.stack(self.all(value)).amax(0)

    def gather(self, rows):
        return torch.cat(self.all(rows))

    def run(self, function):
        results = [None] * self.parts

        def work(part):
            self.local.part = part
            results[part] = function(part)

        workers = [threading.Thread(target=work, args=(part,)) for part in range(self.parts)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join(60)
        return results


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("trained", ["x", "y", "both"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("parts", [1, 3])
def test_gradients_of_either_side_over_processes(backend, trained, masked, parts):
    dtype = torch.float64 if backend == "reference" else torch.float32
    x, y, mask = problem(23, 16, dtype, zeros=False)  # there plain PyTorch's gradient is 1e12
    mask = mask.float() if masked else None
    sides = [side.double().requires_grad_(trained in (name, "both")) for name, side in (("x", x), ("y", y))]
    truth = plain(*sides, None if mask is None else mask.bool(), 20.0)
    wanted = [side for side in sides if side.requires_grad]
    expected = torch.autograd.grad(3 * truth, wanted)
    exchange = Together(parts) if parts > 1 else None

    def part_of(part):
        own = cut(len(x), parts)[part]
        mine = [side[own].to(dtype).requires_grad_(of.requires_grad) for side, of in zip((x, y), sides, strict=True)]
        loss = sf.info_nce(*mine, y, own.start, mask, logit_scale=20.0, exchange=exchange, backend=backend)
        return loss.detach(), torch.autograd.grad(3 * loss, [side for side in mine if side.requires_grad])

    results = [part_of(0)] if exchange is None else exchange.run(part_of)
    tolerance = {"rtol": 1e-12, "atol": 1e-13} if dtype == torch.float64 else {"rtol": 2e-5, "atol": 2e-6}
    torch.testing.assert_close(sum(loss for loss, _ in results).double(), truth.detach(), **tolerance)
    for number, of_side in enumerate(expected):
        found = torch.cat([gradients[number] for _, gradients in results])
        torch.testing.assert_close(found.double(), of_side, **tolerance)


@pytest.mark.parametrize("masked", [False, True])
def test_gradcheck(masked):
    x, y, mask = problem(6, 5, torch.float64, zeros=False)
    x, y = x.requires_grad_(), y.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x, y: sf.info_nce(x, y, mask=mask if masked else None, logit_scale=5.0), (x, y)
    )


def test_the_limit_decides_whether_logits_are_kept(monkeypatch):
    x, y, _ = problem(64, 16, torch.float32)
    x.requires_grad_()
    kept = []
    module = sf.info_nce.__globals__
    real = module["run"]

    def watched(op, *args):
        out = real(op, *args)
        kept.append(out[2].shape[0]) if op == "info_nce_sums" else None
        return out

    monkeypatch.setitem(module, "run", watched)
    mib = 64 * 64 * 4 / 2**20
    grads = [torch.autograd.grad(sf.info_nce(x, y, logits_mib=limit), x)[0] for limit in (mib, 0.99 * mib, 0)]
    with torch.no_grad():
        sf.info_nce(x, y, logits_mib=mib)
    wanted = 64 if "info_nce_sums" in sf.backends()["cpu"].ops else 0
    assert kept == [wanted, 0, 0, 0]
    assert all(torch.equal(grads[0], other) for other in grads[1:])


def test_no_matrix_of_logits_is_stored_by_the_reference(monkeypatch):
    monkeypatch.setattr(reference, "CHUNK_ELEMENTS", 40)
    x, y, mask = problem(30, 8, torch.float64, zeros=False)
    ops = reference.info_nce_sums, reference.info_nce_loss
    for chosen in (None, mask):
        loss, grad = in_parts(ops, x, y, chosen, 10.0, parts=2)
        wide = x.clone().requires_grad_()
        truth = plain(wide, y, chosen, 10.0)
        torch.testing.assert_close(loss, truth.detach())
        torch.testing.assert_close(grad, torch.autograd.grad(truth, wide)[0])


X, Y = problem(6, 8, torch.float32)[:2]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: sf.info_nce(X, Y[:5]), "y has 5 rows but x has 6"),
        (lambda: sf.info_nce(X[:2], Y[:2], Y), r"all_y has 6 rows but x has 2: .* need exchange="),
        (lambda: sf.info_nce(X, Y, first=1), "rows 1 to 7 are not among the 6 rows of all_y"),
        (lambda: sf.info_nce(X, Y, mask=torch.ones(5)), r"mask must have shape \[6\]"),
        (lambda: sf.info_nce(X, Y, mask=torch.full((6,), 0.5)), "mask must hold 0"),
        (lambda: sf.info_nce(X, Y, logit_scale=float("nan")), "logit_scale=nan must be a finite number"),
        (lambda: sf.info_nce(X, Y[:, :4]), "y has d=4 but x has d=8"),
        (lambda: sf.info_nce(X, Y.masked_fill(Y == 0, float("nan"))), "y holds NaN or Inf, first in row 2"),
    ],
)
def test_messages(call, message):
    with pytest.raises(ValueError, match=message):
        call()
