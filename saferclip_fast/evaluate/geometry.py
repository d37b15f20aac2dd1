"""Is the geometry of safe embeddings still there? (SAGE, arXiv 2607.00402)

A model may keep its recall while its embeddings crowd together or trade neighbors, which what is built on them (image
generation, say) feels first.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from ..data.quadruplets import QuadrupletEmbeddings
from ..objectives.safe_geometry import nearest_others
from .metrics import TO_FROZEN, Metric
from .right_items import Contents, first_of_each

NEIGHBORS = 15  # the paper's
FEWEST = 4 * NEIGHBORS  # among fewer items, many are neighbors by chance


def geometry(
    embeddings: QuadrupletEmbeddings, frozen: QuadrupletEmbeddings, contents: Contents | None = None
) -> dict[str, Metric]:
    """Spread and neighbors of safe texts and images, against the frozen model's (1: as they were).

    With z the unit rows of n different safe texts (or images), frozen rows with a 0,

        spread ratio    = mean_i |z_i - mean z|^2 / mean_i |z0_i - mean z0|^2
        neighbors kept  = mean_i |N_i and N0_i| / |N_i or N0_i|

    with N_i the NEIGHBORS nearest of the others to i. The second is the Jaccard index.

    Args:
        embeddings, frozen: [N, d] of the four parts of the same samples, any scale.
        contents: which texts and images are equal; equal ones count once. Default: none are.

    Returns:
        safe_{text,image}_spread_ratio and, of more than FEWEST items, safe_{text,image}_neighbors_kept; none for a
        modality of fewer than 3 items.
    """
    contents = contents or Contents.distinct(len(embeddings.safe_text))
    metrics: dict[str, Metric] = {}
    for name in ("text", "image"):
        part = f"safe_{name}"
        items = first_of_each(getattr(contents, part))
        n = len(items)
        if n < 3:
            continue
        now, before = (F.normalize(getattr(side, part)[items].float(), dim=1) for side in (embeddings, frozen))
        d, d0 = _distances(now), _distances(before)
        ratio = d.mean() / d0.mean()
        spread = ratio + (d - ratio * d0) / d0.mean()  # of mean `ratio`, and of its spread over samples (linearized)
        metrics[f"{part}_spread_ratio"] = Metric(f"safe {name}, spread over frozen", "stays", spread, TO_FROZEN)
        if n > FEWEST:
            share = NEIGHBORS / (n - 1)
            metrics[f"{part}_neighbors_kept"] = Metric(
                f"safe {name}, nearest {NEIGHBORS} kept (Jaccard)",
                "stays",
                _jaccard(nearest_others(now, NEIGHBORS), nearest_others(before, NEIGHBORS)),
                TO_FROZEN,
                chance=share / (2 - share),
            )
    return metrics


def _distances(rows: Tensor) -> Tensor:
    """float32 [n]: squared distance of each row from the mean row."""
    return (rows - rows.mean(0)).square().sum(1)


def _jaccard(a: Tensor, b: Tensor) -> Tensor:
    """float32 [n]: of two sets of k numbers a row."""
    common = (a.unsqueeze(2) == b.unsqueeze(1)).sum((1, 2)).float()
    return common / (2 * a.shape[1] - common)
