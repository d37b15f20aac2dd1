"""SafeR-CLIP, the method: every unsafe input is redirected to its nearest safe neighbors."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping

from torch import Tensor

from ..bank import Bank, SafeBank
from ..data.quadruplets import QuadrupletEmbeddings
from ..ops import Neighbors, retarget_loss
from ..ops.retarget_loss import row_weights, term_rows
from ..runtime.ranks import ALONE, Share
from .common import Objective, ObjectiveOutput, chosen_weights, cosine_distance, label_mask, preserve
from .defaults import (
    DEFAULT_BETA,
    DEFAULT_GUARD_K,
    DEFAULT_GUARD_MARGIN,
    DEFAULT_K,
    DEFAULT_MARGIN,
    DEFAULT_PAGE,
    DEFAULT_WEIGHTS,
)
from .rank_guard import RankGuards, rank_guard, rank_guards
from .safe_geometry import neighbors_lost, of_batch, spread_lost


class SaferClip(Objective):
    """SafeR-CLIP (arXiv 2511.16743): redirect unsafe inputs to their nearest safe neighbors, hold safe ones in place.

        loss = sum_j weights[j] * term_j over the four terms of `retarget_loss`, the four of `preservation_loss` and

        rank_guard = mean_i rank_text(T(t*_i)) + mean_i rank_image(V(v*_i))

    which keeps redirected rows out of the first K results of every safe query (ours: `rank_guard.py`). `attach(bank)`
    takes the safe queries once, before the first batch. The terms `spread` and `neighbors` keep the geometry of safe
    rows (SAGE: `safe_geometry.py`), texts and images added up; at a weight of 0, the default, they are not computed.

    A modality that its label calls safe is never redirected: its row is held in place by the cosine term of its
    modality (term `kept_text` or `kept_image`, weighted as `cos_text` or `cos_image`; ShieldCLIP's label layout).
    A label v between 0 and 1 counts by how sure it is: the row weighs max(0, 2 v - 1) in what redirects and guards, and
    max(0, 1 - 2 v) in what holds (ours, after STAR-DSS, arXiv 2505.17196, which has v and 1 - v); the cross terms
    weigh the product of both sides'.

    Args:
        weights: weight of each term by name, over DEFAULT_WEIGHTS. Without `rank_guard`, nothing is to attach.
        k: nearest safe neighbors a row is redirected to (the paper: 1).
        tau: temperature of the neighbor weights when k > 1.
        beta, margin: sharpness and margin of the relative terms (the paper: 1 and 0).
        negative: "frozen" (the paper) or "current"; see `retarget_loss`.
        page: the first results that the rank guard keeps clear, as a share of a gallery: 0.03 is 30 of 1,000.
        guard_k, guard_margin: safe queries in its hinge, those that a row violates most, and the hinge's margin.
        logit_scale: inverse temperature of the InfoNCE terms.
        backend: of every op.
        check: validate values in every step; off by default, since the training loop checks the loss.

    Raises ValueError for options that do not exist.
    """

    SHOWN = ("uni_text", "uni_image", "cos_text", "cos_image")
    takes_scores = True

    def __init__(
        self,
        weights: Mapping[str, float] | None = None,
        *,
        k: int = DEFAULT_K,
        tau: float = 0.05,
        beta: float = DEFAULT_BETA,
        margin: float = DEFAULT_MARGIN,
        negative: str = "current",
        page: float = DEFAULT_PAGE,
        guard_k: int = DEFAULT_GUARD_K,
        guard_margin: float = DEFAULT_GUARD_MARGIN,
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
        self.page, self.guard_k, self.guard_margin = page, guard_k, guard_margin
        self.guards: RankGuards | None = None
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
        text_is_unsafe, text_is_safe = _how_sure("text_is_unsafe", text_is_unsafe, current.unsafe_text, self.check)
        image_is_unsafe, image_is_safe = _how_sure("image_is_unsafe", image_is_unsafe, current.unsafe_image, self.check)
        masks = term_rows(len(current.unsafe_text), current.unsafe_text.device, text_is_unsafe, image_is_unsafe)
        counts = share.sum(masks.sum(0))
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
            counts=counts,
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
        for name, term in self._more_terms(current, frozen, masks, counts, share).items():
            loss = loss + self.weights[name] * term
            terms[name] = term.detach()
        for name, weights, row, anchor in (
            ("text", text_is_safe, current.unsafe_text, frozen.unsafe_text),
            ("image", image_is_safe, current.unsafe_image, frozen.unsafe_image),
        ):
            if weights is not None:
                kept = cosine_distance(row, anchor, weights, share)
                loss = loss + self.weights[f"cos_{name}"] * kept
                terms[f"kept_{name}"] = kept.detach()
        return ObjectiveOutput(loss, terms, redirect.neighbors)

    def attach(self, bank: Bank) -> None:
        """Take the safe queries of `bank`, that of the whole training set; every rank calls it."""
        if self.weights["rank_guard"]:
            self.guards = rank_guards(bank, self.page, backend=self.backend)

    def _rank_guard(self, current: QuadrupletEmbeddings, row_weights: Tensor) -> Tensor:
        """row_weights [B, 2]: those of texts and of images."""
        if self.guards is None:
            raise ValueError("the rank guard has no safe queries yet: call attach(bank) once before the first batch")
        losses = [
            rank_guard(x, guard, self.guard_k, self.guard_margin, weights, backend=self.backend).loss
            for x, guard, weights in zip(current[2:], self.guards, row_weights.T, strict=True)
        ]
        return losses[0] + losses[1]

    def _more_terms(
        self, current: QuadrupletEmbeddings, frozen: QuadrupletEmbeddings, masks: Tensor, counts: Tensor, share: Share
    ) -> dict[str, Tensor]:
        """The rank guard and the terms over the geometry of safe rows, those of a weight; masks, counts: see above."""
        terms = {}
        if self.weights["rank_guard"]:
            terms["rank_guard"] = self._rank_guard(current, row_weights(masks[:, :2], counts[:2]))
        of_rows: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
            "spread": spread_lost,
            "neighbors": functools.partial(neighbors_lost, backend=self.backend),
        }
        for name, term in of_rows.items():
            if self.weights[name]:
                text = of_batch(term, current.safe_text, frozen.safe_text, share)
                terms[name] = text + of_batch(term, current.safe_image, frozen.safe_image, share)
        return terms

    def _of(self, *names: str) -> dict[str, float]:
        return {name: self.weights[name] for name in names}


def _how_sure(name: str, labels: Tensor | None, like: Tensor, check: bool) -> tuple[Tensor | None, Tensor | None]:
    """[B] how surely each row is unsafe, and safe; at 0 and 1 the labels themselves, at a half neither."""
    if labels is None:
        return None, None
    label = label_mask(name, labels, like, check)
    return (2 * label - 1).clamp(min=0), (1 - 2 * label).clamp(min=0)
