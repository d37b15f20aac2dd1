"""Maps of embeddings: where safe and unsafe captions and images lie before and after, and which way they went."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .charts import Chart, Figure, Group, padded
from .load import PARTS, Run

POINTS = 400  # rows of each part that a map shows: enough to see the clouds
ARROWS = 25  # of each unsafe part
TITLES = {"frozen": "Before", "tuned": "After"}


def embedding_map(run: Run) -> Group | None:
    """The four parts before and after on the same two axes, and arrows from before to after.

    The first axis is what tells safe from unsafe in the model before, u = normalized mean over captions and images of
    (mean of the safe rows - mean of the unsafe rows); the second the main direction across it, of all parts together.
    None where a map cannot be drawn, and for data without unsafe images.
    """
    if run.evaluation.get("text_only"):
        return None  # two of its four parts are one
    sides = [side for side in TITLES if side in run.embeddings]
    shapes = {run.embeddings[side][part].shape for side in sides for part in PARTS}
    if len(shapes) != 1 or min(min(shapes)) < 2:
        return None
    parts = _shown({(side, part): run.embeddings[side][part] for side in sides for part in PARTS})
    if len(parts[sides[0], PARTS[0]]) < 2:
        return None
    directions = _axes(parts, sides[0])
    flat = {key: (rows @ directions).tolist() for key, rows in parts.items()}
    x, y = (padded((point[axis] for points in flat.values() for point in points), 0.04) for axis in (0, 1))
    figures = []
    for side in sides:
        chart = Chart(
            f"{TITLES[side]}: map of embeddings. {_told(flat, side)}",
            *(x, y),
            x_label="← unsafe     safe →",
            y_label="across",
            height=300,
        )
        for part in PARTS:
            chart.dots([(a, b) for a, b in flat[side, part]], _kind(part))
        if side == "tuned" and "frozen" in sides:
            _arrows(chart, flat)
        figures.append(Figure(TITLES[side], chart.svg()))
    legend = [(_kind(part), f"{part.split('_')[0]} {_noun(part)}") for part in PARTS]
    legend += [("arrow", "from before to after: some points, and the mean of each part")] if len(sides) == 2 else []
    return Group("Map of embeddings", figures, legend)


def _kind(part: str) -> str:
    return part.replace("_", " ")


def _noun(part: str) -> str:
    return "captions" if part.endswith("text") else "images"


def _shown(parts: dict[tuple[str, str], Tensor]) -> dict[tuple[str, str], Tensor]:
    """Unit rows [n, d] of each part, n at most POINTS evenly spread ones, the same of all; samples with a row that is
    not finite are left out."""
    finite = torch.stack([rows.isfinite().all(1) for rows in parts.values()]).all(0).nonzero()[:, 0]
    chosen = finite[torch.linspace(0, max(0, len(finite) - 1), min(len(finite), POINTS)).long()]
    return {key: F.normalize(rows[chosen], dim=-1) for key, rows in parts.items()}


def _axes(parts: dict[tuple[str, str], Tensor], before: str) -> Tensor:
    """[d, 2]: the safe-minus-unsafe direction, and the main direction orthogonal to it."""
    apart = [parts[before, f"safe_{m}"].mean(0) - parts[before, f"unsafe_{m}"].mean(0) for m in ("text", "image")]
    first = F.normalize(torch.stack(apart).mean(0), dim=0)
    rows = torch.cat(list(parts.values()))
    rows = rows - rows.mean(0)
    across = rows - (rows @ first)[:, None] * first
    second = torch.linalg.svd(across, full_matrices=False).Vh[0]
    return torch.stack([first, second], 1)


def _arrows(chart: Chart, flat: dict[tuple[str, str], list[list[float]]]) -> None:
    for part in PARTS:
        pairs = list(zip(flat["frozen", part], flat["tuned", part], strict=True))
        if part.startswith("unsafe"):
            for (a, b), (c, d) in pairs[:: max(1, len(pairs) // ARROWS)]:
                chart.arrow((a, b), (c, d), _kind(part))
        (a, b), (c, d) = (_mean(flat[side, part]) for side in ("frozen", "tuned"))
        chart.arrow((a, b), (c, d), f"mean {_kind(part)}")


def _mean(points: list[list[float]]) -> list[float]:
    return [sum(values) / len(points) for values in zip(*points, strict=True)]


def _told(flat: dict[tuple[str, str], list[list[float]]], side: str) -> str:
    """For who cannot see it: where each part lies on the first axis."""
    return ", ".join(f"{_kind(part)} {_noun(part)} at {_mean(flat[side, part])[0]:.2f}" for part in PARTS)
