"""How far a later change of a safe model's weights lies in the directions that made it safe (SafeMERGE)."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import Tensor

State = Mapping[str, Tensor]
FROM_THE_RIGHT = ("visual.proj", "text_projection")  # x @ W


def overlaps(base: State, safe: State, later: State) -> dict[str, float]:
    """rho of every weight that the later change moved; small: it left the directions that made the model safe.

    With V = W_safe - W_base, D = W_later - W_safe as matrices [out, rest] and C = V V^T / |V|:

        rho = cos(C D, D) = |V^T D|^2 / (|V V^T D| |D|), 0 where V is 0        (SafeMERGE, arXiv 2503.17239)

    open_clip's projections, which multiply from the right, lie as [rest, out] and are turned.

    Args:
        base, safe, later: state dicts of one model, before safety, with it, and after somebody's later fine-tuning.

    Returns:
        Name -> rho in [0, 1], in the model's order.

    Raises:
        ValueError: NaN or Inf in a later weight, which is named.
    """
    found = {}
    for name, start in safe.items():
        before, safely, after = (_matrix(name, state[name]) for state in (base, safe, later))
        change, direction = after - safely, safely - before
        if not change.isfinite().all():
            raise ValueError(
                f"the later weights hold NaN or Inf, first in {name}: take its weights from before the training failed"
            )
        if not start.is_floating_point() or not change.any():
            continue
        along = direction.T @ change
        size = torch.linalg.norm(direction @ along) * torch.linalg.norm(change)
        found[name] = min(1.0, float(along.square().sum() / size)) if size > 0 else 0.0
    return found


def restored(base: State, safe: State, later: State, names: Collection[str], add: float) -> dict[str, Tensor]:
    """`later` with W_later + add (W_safe - W_base) for the weights `names`; variances (batch norm) stay at least 0.

    Raises:
        ValueError: names a weight in which the three are of different models.
    """
    for other in (base, safe):
        differ = set(other) ^ set(later) or {name for name in later if other[name].shape != later[name].shape}
        if differ:
            raise ValueError(f"the safe and the later weights are of different models: {min(differ)} does not match")
    found = dict(later)
    for name in names:
        found[name] = later[name] + add * (safe[name] - base[name]).to(later[name])
        if name.endswith("running_var"):
            found[name] = found[name].clamp_min(0)
    return found


def _matrix(name: str, weight: Tensor) -> Tensor:
    """[out, rest] in float64; a vector is one column."""
    rows = weight.detach().cpu().double().reshape(len(weight) if weight.dim() else 1, -1)
    return rows.T if name.endswith(FROM_THE_RIGHT) else rows
