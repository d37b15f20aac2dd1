"""ShieldCLIP, the second baseline: fixed partners, and what to do with a modality follows from its own label."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from types import MappingProxyType

from torch import Tensor

from ..bank import SafeBank
from ..data.quadruplets import QuadrupletEmbeddings
from ..ops import Neighbors
from ..runtime.ranks import ALONE, Share
from .common import Objective, ObjectiveOutput, chosen_weights, cosine_distance, label_mask, preserve, shared_info_nce

# The paper's (arXiv 2609.39688).
WEIGHTS = MappingProxyType({"real": 0.1, "safe": 0.1, "redirect": 0.1, "mix": 0.25, "coherence": 0.25})


class ShieldClip(Objective):
    """ShieldCLIP (arXiv 2609.39688): with labels f_t, f_v of the unsafe side's text and image (1 unsafe, 0 safe),

        real       cos(t) + cos(v) + NCE(T(t), V0(v)) + NCE(V(v), T0(t))             preserves the real pairs
        safe       cos(t*) where f_t = 0, + cos(v*) where f_v = 0, + both NCE of (t*, v*) against the frozen
                   other modality where f_t = f_v = 0                                preserves what is safe
        redirect   1 - cos(T(t*), T0(t)) where f_t = 1, + 1 - cos(V(v*), V0(v)) where f_v = 1
        mix        NCE(T(t*), V0(v*)) where f_t = 1, f_v = 0, + NCE(V(v*), T0(t*)) where f_t = 0, f_v = 1
        coherence  NCE(V(v*), T(t*)) where f_t = f_v = 1
        loss = sum_j weights[j] term_j

    (equations 5 to 10). cos(t) is 1 - cos(T(t), T0(t)), a mean over its own rows (0 if there are none). NCE is the sum,
    not the mean, of InfoNCE in both directions (equation 4), whose negatives are the other rows of its kind.

    Args:
        weights: weight of each term by name, over WEIGHTS.
        logit_scale: inverse temperature of InfoNCE.
        backend, check: of the ops.

    Raises ValueError for terms that do not exist.
    """

    needs_neighbors = False
    SHOWN = ("real", "safe", "redirect", "coherence")

    def __init__(
        self,
        weights: Mapping[str, float] | None = None,
        *,
        logit_scale: float = 100.0,
        backend: str = "auto",
        check: bool = False,
    ) -> None:
        super().__init__()
        self.weights = chosen_weights(WEIGHTS, weights)
        self.logit_scale, self.backend, self.check = logit_scale, backend, check

    def extra_repr(self) -> str:
        return f"weights={self.weights}"

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
        real = preserve(
            *current[:2],
            *frozen[:2],
            weights={"nce_text": 2.0, "nce_image": 2.0},
            logit_scale=self.logit_scale,
            share=share,
            backend=self.backend,
            check=self.check,
        )
        f_t = label_mask("text_is_unsafe", text_is_unsafe, current.unsafe_text, self.check)
        f_v = label_mask("image_is_unsafe", image_is_unsafe, current.unsafe_image, self.check)
        text, image = current.unsafe_text, current.unsafe_image
        both_safe = (1 - f_t) * (1 - f_v)
        cosine = functools.partial(cosine_distance, share=share)

        info_nce = functools.partial(
            shared_info_nce, share=share, logit_scale=self.logit_scale, backend=self.backend, check=self.check
        )

        def nce(x: Tensor, y: Tensor, mask: Tensor) -> Tensor:
            return 2 * info_nce(x, y, mask)  # both directions, summed

        terms = {
            "real": real.loss,
            "safe": cosine(text, frozen.unsafe_text, 1 - f_t)
            + cosine(image, frozen.unsafe_image, 1 - f_v)
            + nce(text, frozen.unsafe_image, both_safe)
            + nce(image, frozen.unsafe_text, both_safe),
            "redirect": cosine(text, frozen.safe_text, f_t) + cosine(image, frozen.safe_image, f_v),
            "mix": nce(text, frozen.unsafe_image, f_t * (1 - f_v)) + nce(image, frozen.unsafe_text, f_v * (1 - f_t)),
            "coherence": nce(image, text, f_t * f_v),
        }
        loss = sum((self.weights[name] * term for name, term in terms.items()), start=real.loss.new_zeros(()))
        return ObjectiveOutput(loss, {name: term.detach() for name, term in terms.items()}, neighbors)
