"""The preservation loss: safe inputs stay where the frozen model put them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from .checks import check_finite, check_first_order, check_matrix, check_number, term_weights
from .choice import run
from .info_nce import LOGITS_MIB

TERMS = ("cos_text", "cos_image", "nce_text", "nce_image")


class PreservationOutput(NamedTuple):
    """The loss of preservation_loss and its terms by name."""

    loss: Tensor  # scalar, differentiable in text and image
    terms: dict[str, Tensor]  # unweighted means, detached


def preservation_loss(
    text: Tensor,
    image: Tensor,
    frozen_text: Tensor,
    frozen_image: Tensor,
    *,
    weights: Mapping[str, float] | None = None,
    logit_scale: float = 100.0,
    logits_mib: float = LOGITS_MIB,
    backend: str = "auto",
    check: bool = True,
) -> PreservationOutput:
    """Holds safe embeddings in place (Safe-CLIP, arXiv 2311.16254; used unchanged by SafeR-CLIP, arXiv 2511.16743).

        cos_text = mean 1 - cos(T(t), T0(t))       cos_image = mean 1 - cos(V(v), V0(v))
        nce_text = InfoNCE(T(t), V0(v))            nce_image = InfoNCE(V(v), T0(t))
        loss     = sum_j weights[j] terms[j]

    InfoNCE is symmetric, (CE(S, diag) + CE(S^T, diag)) / 2 with S = logit_scale x y^T of normalized rows: that of
    `info_nce`, whose kernels these are.

    Args:
        text, image: [B, d] trainable T(t), V(v), same dtype (float64/32, bfloat16, float16), any scale.
        frozen_text, frozen_image: [B, d] T0(t), V0(v), any scale.
        weights: weight of each term by name; one left out weighs 1. An nce term of weight 0 is not computed: it
            costs nothing and reads 0.
        logit_scale: inverse temperature of the InfoNCE terms (CLIP's is 100).
        logits_mib: the [B, B] logits of a term are kept for its gradient up to this size, as in `info_nce`, and
            never stored above it. One matrix at a time; the CUDA C++ kernels store none.
        backend, check: as in `nearest_safe`.

    Returns:
        `PreservationOutput(loss, terms)`. `loss` is float32 (float64 for float64 inputs).

    Raises:
        ValueError: shapes, dtypes, devices or options that do not fit; NaN or Inf, naming tensor and row.
        TypeError, RuntimeError: as `nearest_safe`; a logit_scale that asks for a gradient, a second derivative,
            forward-mode differentiation, transforms of torch.func.
    """
    term_weight, logit_scale = term_weights(TERMS, weights), check_number("logit_scale", logit_scale)
    check_first_order("preservation_loss", text, image)
    if check:
        check_matrix("text", text)
        if text.shape[0] == 0:
            raise ValueError("text has no rows: the loss is a mean over at least one")
        check_finite("text", text)
        for name, value in (("image", image), ("frozen_text", frozen_text), ("frozen_image", frozen_image)):
            check_matrix(name, value, like=("text", text), rows=True)
            check_finite(name, value)
        if image.dtype != text.dtype:
            raise ValueError(f"image is {image.dtype} but text is {text.dtype}; cast one of them")
    need_grad = torch.is_grad_enabled() and (text.requires_grad or image.requires_grad)
    with torch.autocast(text.device.type, enabled=False):  # a kernel's inner matmuls keep the precision it chose
        loss, terms, _, _ = run(
            "preservation_loss",
            backend,
            text,
            text.shape[0] ** 2,
            text,
            image,
            frozen_text.detach(),
            frozen_image.detach(),
            term_weight,
            logit_scale,
            need_grad,
            logits_mib,
        )
    return PreservationOutput(loss, dict(zip(TERMS, terms.detach().unbind(), strict=True)))
