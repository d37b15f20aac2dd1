"""SafeR-CLIP, the method: every unsafe input is redirected to its nearest safe neighbors."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..bank import SafeBank
from ..data.quadruplets import QuadrupletEmbeddings
from ..ops import Neighbors, retarget_loss
from ..ops.nearest_safe import neighbor_weights
from ..ops.retarget_loss import term_rows
from ..runtime.ranks import ALONE, Share
from .common import Objective, ObjectiveOutput, chosen_weights, cosine_distance, label_mask, mean, preserve, unit
from .defaults import DEFAULT_BETA, DEFAULT_K, DEFAULT_MARGIN, DEFAULT_WEIGHTS, KEEP_OUT_MARGIN


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
        text_is_unsafe: Tensor | None = None,
        image_is_unsafe: Tensor | None = None,
        share: Share = ALONE,
    ) -> ObjectiveOutput:
        masks = term_rows(len(current.unsafe_text), current.unsafe_text.device, text_is_unsafe, image_is_unsafe)
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
            text_is_unsafe=text_is_unsafe,
            image_is_unsafe=image_is_unsafe,
            counts=share.sum(masks.sum(0)),
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
            term = self._keep_out(current, bank, redirect.neighbors, masks, share)
            loss = loss + weight * term
            terms["keep_out"] = term.detach()
        for name, labels, row, anchor in (
            ("text", text_is_unsafe, current.unsafe_text, frozen.unsafe_text),
            ("image", image_is_unsafe, current.unsafe_image, frozen.unsafe_image),
        ):
            if labels is not None:
                kept = cosine_distance(row, anchor, 1 - label_mask(f"{name}_is_unsafe", labels, row), share)
                loss = loss + self.weights[f"cos_{name}"] * kept
                terms[f"kept_{name}"] = kept.detach()
        return ObjectiveOutput(loss, terms, redirect.neighbors)

    def _keep_out(
        self, current: QuadrupletEmbeddings, bank: SafeBank, neighbors: Neighbors, masks: Tensor, share: Share
    ) -> Tensor:
        near = neighbors.indices, neighbor_weights(neighbors, self.tau)
        text = keep_out(current.unsafe_text, bank.text, bank.image, *near)
        image = keep_out(current.unsafe_image, bank.image, bank.text, *near)
        return mean(text, masks[:, 0], share) + mean(image, masks[:, 1], share)

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
