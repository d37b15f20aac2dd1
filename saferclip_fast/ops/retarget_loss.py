"""The fused redirection ("retargeting") loss: search, four terms and both gradients."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from .checks import check_finite, check_first_order, check_labels, check_matrix, check_number, term_weights
from .choice import run
from .nearest_safe import Bank, Neighbors, check_bank, nearest_safe, neighbor_weights

TERMS = ("uni_text", "uni_image", "cross_text", "cross_image")


class RetargetOutput(NamedTuple):
    """The loss of retarget_loss, its terms by name and the neighbors used."""

    loss: Tensor  # scalar, differentiable in text and image
    terms: dict[str, Tensor]  # unweighted means, detached
    neighbors: Neighbors


def retarget_loss(
    text: Tensor,
    image: Tensor,
    frozen_text: Tensor,
    frozen_image: Tensor,
    bank: Bank,
    k: int = 1,
    *,
    neighbors: Neighbors | None = None,
    tau: float = 0.05,
    weights: Mapping[str, float] | None = None,
    beta: float = 1.0,
    margin: float = 0.0,
    negative: str = "frozen",
    text_is_unsafe: Tensor | None = None,
    image_is_unsafe: Tensor | None = None,
    counts: Tensor | None = None,
    backend: str = "auto",
    check: bool = True,
) -> RetargetOutput:
    """Redirects unsafe rows to their nearest safe neighbors (SafeR-CLIP, arXiv 2511.16743).

    With u = x/|x| of the trainable rows, r the normalized frozen unsafe rows, and s^ = sum_j w_ij s_j the target over
    the k bank rows nearest to the frozen unsafe text, w_ij = softmax_j(cos_ij / tau):

        uni_text    = mean 1 - u_t . s^_t          uni_image   = mean 1 - u_v . s^_v
        cross_text  = mean softplus(beta (u_t . r_v - u_t . s^_v + margin)) / beta
        cross_image = mean softplus(beta (u_v . r_t - u_v . s^_t + margin)) / beta
        loss        = sum_j weights[j] terms[j]

    k = 1, beta = 1, margin = 0 and negative = "frozen" are the paper's; the rest is ours.

    Args:
        text, image: [B, d] trainable T(t*), V(v*), same dtype (float64/32, bfloat16, float16), any scale.
        frozen_text, frozen_image: [B, d] T0(t*), V0(v*) of the frozen encoders, any scale.
        bank: `SafeBank` of N aligned safe rows.
        k: neighbors a row.
        neighbors: what `nearest_safe(frozen_text, bank, k)` gave earlier; skips the search.
        tau: temperature of the neighbor weights (no effect at k = 1).
        weights: weight of each term by name; one left out weighs 1.
        beta: sharpness of the softplus.
        margin: by how much the safe target must beat the negative before the cross terms fade.
        negative: "frozen" pushes from r; "current" pushes from the counterpart's present row, under stop-gradient.
        text_is_unsafe, image_is_unsafe: [B] labels in [0, 1], 1 unsafe (default), 0 safe. A modality labeled safe is
            not redirected; a cross term needs both labels. A term is a mean over its rows, each weighted by its label
            (cross terms: by the product of both), over the weights' sum or 1, whichever is more.
        counts: [4] the rows each term is a mean over, or the sum of their weights, where these rows belong to a larger
            batch (data-parallel training): loss and terms of all its pieces then add up to those of the batch.
            Default: of the rows given.
        backend, check: as in `nearest_safe`.

    Returns:
        `RetargetOutput(loss, terms, neighbors)`. `loss` is float32 (float64 for float64 inputs).

    Raises:
        ValueError: shapes, dtypes, devices or options that do not fit; NaN or Inf, naming tensor and row.
        TypeError, RuntimeError: as `nearest_safe`; a second derivative, forward-mode differentiation, transforms of
            torch.func.
    """
    if negative not in ("frozen", "current"):
        raise ValueError(f"negative={negative!r} must be 'frozen' or 'current'")
    beta, tau, margin = (
        check_number(name, value) for name, value in (("beta", beta), ("tau", tau), ("margin", margin))
    )
    if beta <= 0 or tau <= 0:
        raise ValueError(f"beta={beta:g} and tau={tau:g} must be positive")
    term_weight = term_weights(TERMS, weights)
    check_first_order("retarget_loss", text, image)
    if check:
        _check(text, image, frozen_text, frozen_image, bank, neighbors, counts)
    if neighbors is None:
        neighbors = nearest_safe(frozen_text, bank, k, backend=_search_backend(backend, text), check=check)
    need_grad = torch.is_grad_enabled() and (text.requires_grad or image.requires_grad)
    loss, terms, _, _ = run(
        "retarget_loss",
        backend,
        text,
        neighbors.indices.numel(),
        text,
        image,
        frozen_text.detach(),
        frozen_image.detach(),
        bank.text,
        bank.image,
        neighbors.indices,
        neighbor_weights(neighbors, tau),
        row_weights(term_rows(text.shape[0], text.device, text_is_unsafe, image_is_unsafe, check), counts),
        term_weight,
        beta,
        margin,
        negative == "current",
        need_grad,
    )
    return RetargetOutput(loss, dict(zip(TERMS, terms.detach().unbind(), strict=True)), neighbors)


def term_rows(
    count: int,
    device: torch.device,
    text_is_unsafe: Tensor | None,
    image_is_unsafe: Tensor | None,
    check: bool = False,
) -> Tensor:
    """How much of each row each term is a mean over: with labels of 0 and 1, a mask.

    Args:
        count: B, rows of the batch.
        device: where the mask goes.
        text_is_unsafe, image_is_unsafe: as in `retarget_loss`.
        check: look at the values of the labels, which waits for the device.

    Returns:
        [B, 4] float32 in [0, 1].

    Raises:
        TypeError, ValueError: labels of another shape or, with `check`, outside [0, 1].
    """
    ones = torch.ones(count, device=device)
    if text_is_unsafe is None and image_is_unsafe is None:
        return ones.unsqueeze(1).expand(count, 4)
    text, image = (
        ones if labels is None else check_labels(name, labels, count, device, check)
        for name, labels in (("text_is_unsafe", text_is_unsafe), ("image_is_unsafe", image_is_unsafe))
    )
    return torch.stack([text, image, text * image, text * image], dim=1)


def row_weights(mask: Tensor, counts: Tensor | None = None) -> Tensor:
    """The weight of each row in each term: its part in the mask over what the whole batch has of the term.

    Args:
        mask: [B, 4] of `term_rows`.
        counts: as in `retarget_loss`.

    Returns:
        [B, 4] float32.
    """
    return (mask / (mask.sum(0) if counts is None else counts).clamp(min=1)).contiguous()


def _search_backend(backend: str, text: Tensor) -> str:
    return "auto" if backend == "auto" or text.dtype == torch.float64 else backend


def _check(text, image, frozen_text, frozen_image, bank, neighbors, counts) -> None:
    check_matrix("text", text)
    for name, value in (("image", image), ("frozen_text", frozen_text), ("frozen_image", frozen_image)):
        check_matrix(name, value, like=("text", text), rows=True)
    if image.dtype != text.dtype:
        raise ValueError(f"image is {image.dtype} but text is {text.dtype}; cast one of them")
    check_matrix("bank.text", check_bank(bank)[0], like=("text", text))
    if counts is not None:
        _check_counts(counts)
    for name, value in (("text", text), ("image", image), ("frozen_image", frozen_image)):
        check_finite(name, value)
    if neighbors is None:  # else nearest_safe checks frozen_text
        return
    check_finite("frozen_text", frozen_text)
    if not isinstance(neighbors, Neighbors):
        raise TypeError(f"neighbors must be what nearest_safe gave, got {type(neighbors).__name__}")
    shape = neighbors.indices.shape
    if neighbors.indices.dim() != 2 or shape[0] != text.shape[0] or neighbors.scores.shape != shape:
        raise ValueError(
            f"neighbors must hold scores and indices of shape [{text.shape[0]}, k], got"
            f" {tuple(neighbors.scores.shape)} and {tuple(shape)}; pass the rows of this batch"
        )
    for name, part in (("neighbors.scores", neighbors.scores), ("neighbors.indices", neighbors.indices)):
        if part.device != text.device:
            raise ValueError(f"{name} is on {part.device} but text is on {text.device}; move one with .to()")
    if not torch.compiler.is_compiling() and neighbors.indices.numel():
        low, high = int(neighbors.indices.min()), int(neighbors.indices.max())
        if low < 0 or high >= bank.text.shape[0]:
            raise ValueError(
                f"neighbors.indices spans {low}..{high} but the bank has {bank.text.shape[0]} rows;"
                " it was searched in another bank"
            )


def _check_counts(counts: Tensor) -> None:
    if not isinstance(counts, Tensor):
        raise TypeError(f"counts must be a torch.Tensor, got {type(counts).__name__}")
    if counts.shape != (4,):
        raise ValueError(f"counts must have shape [4], one number of rows a term, got {tuple(counts.shape)}")
    if not torch.compiler.is_compiling() and not bool(((counts >= 0) & counts.isfinite()).all()):
        raise ValueError(f"counts must be numbers of rows, 0 or more, got {counts.tolist()}")
