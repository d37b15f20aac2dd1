"""The safety dial: weights between the frozen and the fine-tuned model, and a little beyond."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor

from . import ClipModel


def interpolate(frozen: Mapping[str, Tensor], tuned: Mapping[str, Tensor], alpha: float) -> dict[str, Tensor]:
    """W0 + alpha (W1 - W0) for every weight W0 of `frozen` and W1 of `tuned`: two state dicts of one model.

    alpha = 0 gives the frozen weights, 1 the fine-tuned ones, bit for bit; above 1 goes further the same way. Counters
    are taken from `tuned`, and variances (batch norm) stay at least 0.

    Raises ValueError, naming a weight, where the two are not of one model.
    """
    differ = set(frozen) ^ set(tuned) or {name for name in frozen if frozen[name].shape != tuned[name].shape}
    if differ:
        raise ValueError(f"frozen and tuned weights are of different models: {min(differ)} does not match")
    mixed = {}
    for name, end in tuned.items():
        mixed[name] = torch.lerp(frozen[name].to(end), end, alpha) if end.is_floating_point() else end
        if name.endswith("running_var"):
            mixed[name] = mixed[name].clamp_min(0)
    return mixed


def mix(frozen: ClipModel, tuned: ClipModel, alpha: float) -> ClipModel:
    """A model of its own with the weights `interpolate` gives; both as load_clip returns them, adapters merged."""
    weights = interpolate(frozen.model.state_dict(), tuned.model.state_dict(), alpha)
    clip = copy.deepcopy(tuned)
    clip.model.load_state_dict(weights)
    clip.weights_hash = clip.hash_weights()
    return clip
