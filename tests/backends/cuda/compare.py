"""The error rule of docs/architecture.md: a backend's error is compared with plain PyTorch's, not guessed."""

from torch import Tensor, finfo


def allowed_error(found: Tensor, truth: Tensor, plain: Tensor) -> float:
    """Twice the error of the plain path in the same dtype, plus one rounding unit of the largest entry."""
    return float(2 * (plain - truth).abs().max() + finfo(found.dtype).eps * truth.abs().max())


def check_loss(found: list[Tensor], truth: list[Tensor], plain: list[Tensor], weights: list[float]) -> None:
    """(loss, terms, grad_text, grad_image) of a loss op; `truth` is the reference in float64.

    The loss is one number, in which the plain path's errors may cancel by luck: it is allowed what its terms are.
    """
    for f, t in zip(found, truth, strict=True):
        assert f.shape == t.shape
    of_terms = allowed_error(found[1], truth[1], plain[1])
    allowed = [sum(abs(w) for w in weights) * of_terms + allowed_error(found[0], truth[0], truth[0]), of_terms]
    allowed += [
        allowed_error(f, t, p) if t.numel() else 0.0 for f, t, p in zip(found[2:], truth[2:], plain[2:], strict=True)
    ]
    for name, f, t, limit in zip(("loss", "terms", "grad_text", "grad_image"), found, truth, allowed, strict=True):
        error = float((f - t).abs().max()) if t.numel() else 0.0
        assert error <= limit, f"{name}: error {error:.3g}, the plain path allows {limit:.3g}"
