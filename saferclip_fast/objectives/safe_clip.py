"""Safe-CLIP, the baseline: every unsafe input is redirected to its fixed safe partner."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from types import MappingProxyType

from torch import Tensor

from ..bank import SafeBank
from ..data.quadruplets import QuadrupletEmbeddings
from ..ops import Neighbors, nearest_safe
from ..runtime.ranks import ALONE, Share
from .common import Objective, ObjectiveOutput, chosen_weights, cosine_distance, label_mask, preserve, shared_info_nce

# The authors' (arXiv 2311.16254 and its code).
WEIGHTS = MappingProxyType(
    {
        "text_safe": 0.1,
        "text_nsfw": 0.1,
        "vision_safe": 0.1,
        "vision_nsfw": 0.2,
        "S_Vref": 0.25,
        "U_Vref": 0.25,
        "V_Sref": 0.25,
        "G_Sref": 0.5,
    }
)
# Terms of `preservation_loss`, and what they are called here for the safe and the unsafe side of the quadruplets.
OP_TERMS = ("cos_text", "cos_image", "nce_text", "nce_image")
SAFE_TERMS = ("text_safe", "vision_safe", "S_Vref", "V_Sref")
UNSAFE_TERMS = ("text_nsfw", "vision_nsfw", "U_Vref", "G_Sref")


class SafeClip(Objective):
    """Safe-CLIP (ECCV 2024, arXiv 2311.16254): eight terms under the authors' names.

        text_safe    1 - cos(T(t), T0(t))      S_Vref  InfoNCE(T(t), V0(v))
        vision_safe  1 - cos(V(v), V0(v))      V_Sref  InfoNCE(V(v), T0(t))
        text_nsfw    1 - cos(T(t*), T0(t))     U_Vref  InfoNCE(T(t*), V0(v))
        vision_nsfw  1 - cos(V(v*), V0(v))     G_Sref  InfoNCE(V(v*), T0(t))
        loss = sum_j weights[j] term_j / sum_j weights[j] / 8

    Means over the batch; InfoNCE is symmetric, with the rest of the batch as negatives. A modality that its label calls
    safe is left out of the unsafe side's terms and held in place instead: kept_text, weighted as text_safe, and
    kept_image, as vision_safe.

    Args:
        weights: weight of each term by name, over WEIGHTS.
        targets: "pair", the sample's own (t, v); or "nearest", the safe pair nearest to t* in the bank: SafeR-CLIP's
            proximity-based alignment alone, for ablations.
        logit_scale: inverse temperature of InfoNCE (the authors' exp(4.6052) is 100).
        backend, check: of the ops.

    Raises ValueError for terms and targets that do not exist, or weights that are all 0.
    """

    SHOWN = ("text_nsfw", "vision_nsfw", "text_safe", "vision_safe")

    def __init__(
        self,
        weights: Mapping[str, float] | None = None,
        *,
        targets: str = "pair",
        logit_scale: float = 100.0,
        backend: str = "auto",
        check: bool = False,
    ) -> None:
        super().__init__()
        if targets not in ("pair", "nearest"):
            raise ValueError(f"targets={targets!r} must be 'pair' or 'nearest'")
        self.weights = chosen_weights(WEIGHTS, weights)
        total = sum(self.weights.values())
        if total <= 0:
            raise ValueError("weights sum to 0: at least one term must have a weight")
        self.scale = {name: weight / total / len(WEIGHTS) for name, weight in self.weights.items()}
        self.targets, self.logit_scale, self.backend, self.check = targets, logit_scale, backend, check
        self.needs_neighbors = targets == "nearest"

    def extra_repr(self) -> str:
        return f"targets={self.targets}, weights={self.weights}"

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
        target_text, target_image = frozen.safe_text, frozen.safe_image
        if self.targets == "nearest":
            if neighbors is None:
                neighbors = nearest_safe(frozen.unsafe_text, bank, 1, backend=self.backend, check=self.check)
            nearest = neighbors.indices[:, 0]
            target_text, target_image = bank.text[nearest], bank.image[nearest]
        loss, terms = self._pair(SAFE_TERMS, share, *current[:2], *frozen[:2])
        if text_is_unsafe is None and image_is_unsafe is None:
            unsafe_loss, unsafe_terms = self._pair(UNSAFE_TERMS, share, *current[2:], target_text, target_image)
            return ObjectiveOutput(loss + unsafe_loss, terms | unsafe_terms, neighbors)
        text = label_mask("text_is_unsafe", text_is_unsafe, current.unsafe_text, self.check)
        image = label_mask("image_is_unsafe", image_is_unsafe, current.unsafe_image, self.check)
        nce = functools.partial(
            shared_info_nce, share=share, logit_scale=self.logit_scale, backend=self.backend, check=self.check
        )
        labeled = {
            "text_nsfw": cosine_distance(current.unsafe_text, target_text, text, share),
            "vision_nsfw": cosine_distance(current.unsafe_image, target_image, image, share),
            "U_Vref": nce(current.unsafe_text, target_image, text),
            "G_Sref": nce(current.unsafe_image, target_text, image),
            "kept_text": cosine_distance(current.unsafe_text, frozen.unsafe_text, 1 - text, share),
            "kept_image": cosine_distance(current.unsafe_image, frozen.unsafe_image, 1 - image, share),
        }
        scale = {**self.scale, "kept_text": self.scale["text_safe"], "kept_image": self.scale["vision_safe"]}
        for name, term in labeled.items():
            loss = loss + scale[name] * term
            terms[name] = term.detach()
        return ObjectiveOutput(loss, terms, neighbors)

    def _pair(
        self,
        names: tuple[str, ...],
        share: Share,
        text: Tensor,
        image: Tensor,
        anchor_text: Tensor,
        anchor_image: Tensor,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """One side's four terms, and their weighted sum."""
        out = preserve(
            text,
            image,
            anchor_text,
            anchor_image,
            weights={term: self.scale[name] for term, name in zip(OP_TERMS, names, strict=True)},
            logit_scale=self.logit_scale,
            share=share,
            backend=self.backend,
            check=self.check,
        )
        return out.loss, {name: out.terms[term] for term, name in zip(OP_TERMS, names, strict=True)}
