"""Single cases: the items that an unsafe caption finds before and after, for readers who want more than means."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..data import QuadrupletDataset
from ..data.quadruplets import QuadrupletEmbeddings
from ..ops import nearest_safe
from ..results import PAGE
from .metrics import Labels

FOUND = PAGE  # items listed for each caption and model


class _Gallery(NamedTuple):
    """The best items for every unsafe caption among all images, safe ones first: [N, FOUND] and [N]."""

    scores: Tensor
    indices: Tensor
    margin: Tensor  # cosine of the best unsafe image minus that of the best safe one


def captions(
    dataset: QuadrupletDataset, sides: Mapping[str, QuadrupletEmbeddings], labels: Labels, count: int, worst: int
) -> dict[str, list[dict[str, Any]]]:
    """Cases of single unsafe captions.

    Args:
        dataset: the samples; sides: "frozen" and "tuned" (or "tuned" alone) -> their embeddings [N, d].
        count: how many captions to list, evenly spread over the data set; worst: how many of the worst.

    Returns "examples" and "worst_cases": lists of
        {"row", "unsafe_text", "nearest_safe": {"row", "text", "score"}, and under each side's name {"margin", "found":
        [{"kind": "safe" | "unsafe", "side": "safe" | "unsafe", "row", "text", "score"}]}}.
    nearest_safe is the safe caption of highest cosine to the unsafe one under the frozen model (SafeR-CLIP's target);
    found are the best images of the gallery of safe and unsafe ones, described by their captions: `side` says which
    image of sample `row` it is, `kind` whether it is unsafe (the two differ where a label says so); margin is the
    cosine of the best unsafe image minus that of the best safe one, positive where the caption finds an unsafe image.
    The worst cases are those of largest margin after tuning. Both lists are empty where nothing is labeled unsafe.
    """
    unsafe_samples = labels.text_is_unsafe.nonzero().flatten()
    if not len(unsafe_samples) or not labels.image_is_unsafe.any():
        return {"examples": [], "worst_cases": []}
    anchor = sides.get("frozen", sides["tuned"])
    nearest = nearest_safe(anchor.unsafe_text, F.normalize(anchor.safe_text, dim=-1))
    galleries = {name: _search(embeddings, labels) for name, embeddings in sides.items()}
    spread = torch.linspace(0, len(unsafe_samples) - 1, min(count, len(unsafe_samples))).long()
    by_margin = galleries["tuned"].margin[unsafe_samples].argsort(descending=True, stable=True)

    def case(row: int) -> dict[str, Any]:
        target = int(nearest.indices[row, 0])
        return {
            "row": row,
            "unsafe_text": dataset.records[row].unsafe_text,
            "nearest_safe": {
                "row": target,
                "text": dataset.records[target].safe_text,
                "score": float(nearest.scores[row, 0]),
            },
            **{name: _found(dataset, gallery, labels, row) for name, gallery in galleries.items()},
        }

    return {
        "examples": [case(row) for row in unsafe_samples[spread].tolist()],
        "worst_cases": [case(row) for row in unsafe_samples[by_margin[:worst]].tolist()],
    }


def _search(embeddings: QuadrupletEmbeddings, labels: Labels) -> _Gallery:
    count = len(labels.text_is_unsafe)
    images = F.normalize(torch.cat([embeddings.safe_image, embeddings.unsafe_image]), dim=-1)
    scores, indices = nearest_safe(embeddings.unsafe_text, images, min(FOUND, len(images)))
    is_unsafe = torch.cat([torch.zeros(count, dtype=torch.bool), labels.image_is_unsafe.bool()])
    best_unsafe, best_safe = (
        nearest_safe(embeddings.unsafe_text, images[kept]).scores[:, 0] for kept in (is_unsafe, ~is_unsafe)
    )
    return _Gallery(scores, indices, best_unsafe - best_safe)


def _found(dataset: QuadrupletDataset, gallery: _Gallery, labels: Labels, row: int) -> dict[str, Any]:
    count, found = len(labels.text_is_unsafe), []
    for index, score in zip(gallery.indices[row].tolist(), gallery.scores[row].tolist(), strict=True):
        record, generated = dataset.records[index % count], index >= count
        found.append(
            {
                "kind": "unsafe" if generated and record.image_is_unsafe else "safe",
                "side": "unsafe" if generated else "safe",
                "row": index % count,
                "text": record.unsafe_text if generated else record.safe_text,
                "score": score,
            }
        )
    return {"margin": float(gallery.margin[row]), "found": found}
