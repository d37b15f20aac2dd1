"""SafeR-CLIP, the method: every unsafe input is redirected to its nearest safe neighbors."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..bank import SafeBank
from ..distributed import ALONE, Share
from ..ops import Neighbors, retarget_loss
from ..ops.nearest_safe import neighbor_weights
from ..ops.retarget_loss import term_rows
from .common import (
    Objective,
    ObjectiveOutput,
    QuadrupletEmbeddings,
    chosen_weights,
    cosine_distance,
    label_rows,
    mean,
    preserve,
    unit,
)

# Chosen by measurement on synthetic scenes and photographs: docs/method.md, "Weights".
DEFAULT_WEIGHTS = {
    "uni_text": 4.0,
    "uni_image": 1.0,
    "cross_text": 4.0,
    "cross_image": 4.0,
    "cos_text": 16.0,
    "cos_image": 16.0,
    "nce_text": 0.2,
    "nce_image": 0.2,
    "keep_out": 4.0,
}
DEFAULT_K, DEFAULT_BETA, DEFAULT_MARGIN, KEEP_OUT_MARGIN = 16, 10.0, 0.3, 0.1


class SaferClip(Objective):
    """SafeR-CLIP (arXiv 2511.16743): redirect unsafe inputs to their nearest safe neighbors, hold safe ones in place.

        loss = sum_j weights[j] * term_j over the four terms of `retarget_loss`, the four of `preservation_loss` and

        keep_out = mean_i sum_j w_ij max(0, m + cos(T(t*_i), V0(v_j)) - cos(T0(t_j), V0(v_j))) + the same of V(v*_i)

    over the neighbors j of row i, w_ij as in `retarget_loss`, m KEEP_OUT_MARGIN (ours): redirected rows come close to
    safe items, but not between them and the safe queries that look for them.

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

    Raises ValueError for options that do not exist.
    """

    SHOWN = ("uni_text", "uni_image", "cos_text", "cos_image")

    def __init__(
        self,
        weights: Mapping[str, float] | None = None,
        *,
        k: int = DEFAULT_K,
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
            text_is_unsafe=unsafe_text,
            image_is_unsafe=unsafe_image,
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
        if weight := self.weights["keep_out"]:
            term = self._keep_out(current, bank, redirect.neighbors, rows, share)
            loss = loss + weight * term
            terms["keep_out"] = term.detach()
        for name, labels, row, anchor in (
            ("text", unsafe_text, current.unsafe_text, frozen.unsafe_text),
            ("image", unsafe_image, current.unsafe_image, frozen.unsafe_image),
        ):
            if labels is not None:
                kept = cosine_distance(row, anchor, 1 - label_rows(f"unsafe_{name}", labels, row), share)
                loss = loss + self.weights[f"cos_{name}"] * kept
                terms[f"kept_{name}"] = kept.detach()
        return ObjectiveOutput(loss, terms, redirect.neighbors)

    def _keep_out(
        self, current: QuadrupletEmbeddings, bank: SafeBank, neighbors: Neighbors, rows: Tensor, share: Share
    ) -> Tensor:
        near = neighbors.indices, neighbor_weights(neighbors, self.tau)
        text = keep_out(current.unsafe_text, bank.text, bank.image, *near)
        image = keep_out(current.unsafe_image, bank.image, bank.text, *near)
        return mean(text, rows[:, 0], share) + mean(image, rows[:, 1], share)

    def _of(self, *names: str) -> dict[str, float]:
        return {name: self.weights[name] for name in names}


def keep_out(
    x: Tensor, items: Tensor, queries: Tensor, indices: Tensor, weights: Tensor, margin: float = KEEP_OUT_MARGIN
) -> Tensor:
    """[B] sum_j w_j max(0, margin + cos(x, q_j) - cos(s_j, q_j)): how far rows x get in the way of safe items.

    q_j is the safe query whose own item is s_j: a redirected x may come close to s_j, but q_j must find s_j first.

    Args:
        x: [B, d] trainable rows, any scale.
        items, queries: [N, d] unit rows of the bank, s of the modality of x, q of the other one.
        indices, weights: [B, k] the safe neighbors of each row.
    """
    u = unit(x)
    with torch.no_grad():  # linear in u where the hinge is open: one [B, d] sum is all that autograd keeps
        slope, offset = torch.zeros_like(u), u.new_zeros(len(u))
        for index, weight in zip(indices.unbind(1), weights.unbind(1), strict=True):
            query = queries[index].to(u.dtype)
            limit = (items[index] * query).sum(-1) - margin
            open_ = weight * ((u * query).sum(-1) > limit)
            slope += open_.unsqueeze(1) * query
            offset -= open_ * limit
    return (u * slope).sum(-1) + offset
