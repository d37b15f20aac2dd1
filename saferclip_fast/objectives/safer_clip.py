"""SafeR-CLIP, the method: every unsafe input is redirected to its nearest safe neighbors."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from ..bank import SafeBank
from ..distributed import ALONE, Share
from ..ops import Neighbors, retarget_loss
from ..ops.retarget_loss import term_rows
from .common import (
    Objective,
    ObjectiveOutput,
    QuadrupletEmbeddings,
    chosen_weights,
    cosine_distance,
    label_rows,
    preserve,
)

# Chosen by measurement on synthetic scenes and photographs: docs/method.md, "Weights".
DEFAULT_WEIGHTS = {
    "uni_text": 4.0,
    "uni_image": 1.0,
    "cross_text": 4.0,
    "cross_image": 4.0,
    "cos_text": 8.0,
    "cos_image": 8.0,
    "nce_text": 0.2,
    "nce_image": 0.2,
}
DEFAULT_BETA, DEFAULT_MARGIN = 10.0, 0.2


class SaferClip(Objective):
    """SafeR-CLIP (arXiv 2511.16743): redirect unsafe inputs to their nearest safe neighbors, hold safe ones in place.

        loss = sum_j weights[j] * term_j over the four terms of `retarget_loss` and the four of `preservation_loss`

    A modality that its label calls safe is never redirected: its row is held in place by the cosine term of its
    modality (term `kept_text` or `kept_image`, weighted as `cos_text` or `cos_image`; ShieldCLIP's label layout).

    Args:
        weights: weight of each term by name, over DEFAULT_WEIGHTS.
        k: nearest safe neighbors a row is redirected to (the paper: 1).
        tau: temperature of the neighbor weights when k > 1.
        beta, margin: sharpness and margin of the relative terms (the paper: 1 and 0).
        negative: "frozen" (the paper) or "current"; see `retarget_loss`.
        logit_scale: inverse temperature of the InfoNCE terms.
        backend: of every op.
        check: validate values in every step; off by default, since the training loop checks the loss.
    """

    SHOWN = ("uni_text", "uni_image", "cos_text", "cos_image")

    def __init__(
        self,
        weights: Mapping[str, float] | None = None,
        *,
        k: int = 1,
        tau: float = 0.05,
        beta: float = DEFAULT_BETA,
        margin: float = DEFAULT_MARGIN,
        negative: str = "current",
        logit_scale: float = 100.0,
        backend: str = "auto",
        check: bool = False,
    ) -> None:
        super().__init__()
        if negative not in ("frozen", "current"):
            raise ValueError(f"negative={negative!r} must be 'frozen' or 'current'")
        if k < 1:
            raise ValueError(f"k={k} must be at least 1")
        self.weights = chosen_weights(DEFAULT_WEIGHTS, weights)
        self.k, self.tau, self.beta, self.margin = k, tau, beta, margin
        self.negative, self.logit_scale, self.backend, self.check = negative, logit_scale, backend, check

    def extra_repr(self) -> str:
        return f"k={self.k}, negative={self.negative}, beta={self.beta}, margin={self.margin}, weights={self.weights}"

    def forward(
        self,
        current: QuadrupletEmbeddings,
        frozen: QuadrupletEmbeddings,
        bank: SafeBank,
        neighbors: Neighbors | None = None,
        unsafe_text: Tensor | None = None,
        unsafe_image: Tensor | None = None,
        share: Share = ALONE,
    ) -> ObjectiveOutput:
        rows = term_rows(len(current.unsafe_text), current.unsafe_text.device, unsafe_text, unsafe_image)
        redirect = retarget_loss(
            current.unsafe_text,
            current.unsafe_image,
            frozen.unsafe_text,
            frozen.unsafe_image,
            bank,
            self.k,
            neighbors=neighbors,
            tau=self.tau,
            weights=self._of("uni_text", "uni_image", "cross_text", "cross_image"),
            beta=self.beta,
            margin=self.margin,
            negative=self.negative,
            unsafe_text=unsafe_text,
            unsafe_image=unsafe_image,
            counts=share.sum(rows.sum(0)),
            backend=self.backend,
            check=self.check,
        )
        held = preserve(
            current.safe_text,
            current.safe_image,
            frozen.safe_text,
            frozen.safe_image,
            weights=self._of("cos_text", "cos_image", "nce_text", "nce_image"),
            logit_scale=self.logit_scale,
            share=share,
            backend=self.backend,
            check=self.check,
        )
        loss = redirect.loss + held.loss
        terms = {**redirect.terms, **held.terms}
        for name, labels, row, anchor in (
            ("text", unsafe_text, current.unsafe_text, frozen.unsafe_text),
            ("image", unsafe_image, current.unsafe_image, frozen.unsafe_image),
        ):
            if labels is not None:
                kept = cosine_distance(row, anchor, 1 - label_rows(f"unsafe_{name}", labels, row), share)
                loss = loss + self.weights[f"cos_{name}"] * kept
                terms[f"kept_{name}"] = kept.detach()
        return ObjectiveOutput(loss, terms, redirect.neighbors)

    def _of(self, *names: str) -> dict[str, float]:
        return {name: self.weights[name] for name in names}
