"""The error rule of docs/architecture.md: a backend's error is compared with plain PyTorch's, not guessed.

A gradient is judged row by row, by that row's own size: rows of a batch differ by 1e4 and more, and a rule for the
whole tensor sees the largest alone.
"""

import torch
from torch import Tensor, finfo

from saferclip_fast.ops import reference

NAMES = ("loss", "terms", "grad_text", "grad_image")
EPS = finfo(torch.float32).eps
LIBM = 4 * EPS  # what rsqrtf (2 ulp) and expf (1 ulp) of a GPU may add


def wide(arguments, dtype: torch.dtype = torch.float64) -> list:
    """The same arguments in float64."""
    return [a.to(dtype) if isinstance(a, Tensor) and a.is_floating_point() else a for a in arguments]


def check_loss(op: str, found: list[Tensor], arguments: list) -> None:
    """`found`: (loss, terms, grad_text, grad_image) of a loss op; the truth is its reference in float64.

    Plain PyTorch is the reference in float32, in four orders of the columns: of a few numbers, one order gets some
    right by luck. A row of a gradient may be off by twice plain's worst row, both in units of 1 / |x|, which every row
    has as a factor, by a rounding of its own size and one of what it is a difference of. The loss is allowed what its
    terms are.
    """
    found, arguments = [x.cpu() for x in found], [a.cpu() if isinstance(a, Tensor) else a for a in arguments]
    truth = getattr(reference, op)(*wide(arguments))
    for name, f, t in zip(NAMES, found, truth, strict=True):
        assert f.shape == t.shape and torch.isfinite(f).all(), name
    plain = [_plain(op, wide(arguments, torch.float32), seed) for seed in range(4)]
    weights = next(a for a in arguments if isinstance(a, list))
    of_terms = _largest(2 * (p[1] - truth[1]).abs().max() for p in plain) + (EPS + LIBM) * truth[1].abs().max()
    of_loss = sum(abs(w) for w in weights) * of_terms + EPS * truth[0].abs()
    _judge("terms", (found[1] - truth[1]).abs().max(), of_terms)
    _judge("loss", (found[0] - truth[0]).abs(), of_loss)
    if not truth[2].numel():
        return
    for side, x in enumerate(arguments[:2]):
        f, t, kind = found[2 + side], truth[2 + side], finfo(x.dtype)
        assert f.dtype == x.dtype
        length, size = x.double().norm(dim=1), t.norm(dim=1)
        rough = _largest(((p[2 + side] - t).norm(dim=1) * length).max() for p in plain)
        denormal = kind.smallest_normal * kind.eps * t.shape[1] ** 0.5
        allowed = 2 * rough + EPS * _subtracted(op, arguments, side)
        allowed = allowed / length.masked_fill(length == 0, torch.inf) + (kind.eps + LIBM) * size + denormal
        _judge(NAMES[2 + side], (f.double() - t).norm(dim=1), allowed)


def _subtracted(op: str, arguments: list, side: int) -> float:
    """The size, times |x|, of the frozen counterpart that the gradient of InfoNCE is left of, as in test_info_nce."""
    if op == "retarget_loss":
        return 0.0
    weights, logit_scale = arguments[4:6]
    return (abs(weights[side]) + abs(weights[2 + side] * logit_scale)) / len(arguments[0])


def _plain(op: str, arguments: list, seed: int) -> list[Tensor]:
    """The reference with the columns in another order (as they are for seed 0), which changes its rounding alone."""
    width = arguments[0].shape[1]
    order = torch.randperm(width, generator=torch.Generator().manual_seed(seed)) if seed else torch.arange(width)
    embeddings = 6 if op == "retarget_loss" else 4
    columns = [a[:, order] if i < embeddings else a for i, a in enumerate(arguments)]
    loss, terms, *gradients = getattr(reference, op)(*columns)
    return [loss, terms, *(g[:, order.argsort()] for g in gradients)]


def _largest(numbers) -> Tensor:
    return torch.stack(list(numbers)).max()


def _judge(name: str, error: Tensor, limit: Tensor) -> None:
    share = (error / limit).masked_fill(error == 0, 0.0)
    row = f" of row {int(share.argmax())}" if error.dim() else ""
    worst = error.flatten()[share.argmax()]
    assert share.max() <= 1, f"{name}{row}: error {worst:.3g}, error / limit {share.max():.3g}"
