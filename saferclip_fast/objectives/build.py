"""The objective that a run's options describe."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

from . import Objective, SafeClip, SaferClip, ShieldClip

if TYPE_CHECKING:  # config takes its defaults from the objectives
    from ..config import Config


def build_objective(config: Config) -> Objective:
    """One of this package's objectives with the options of config.objective."""
    options = config.objective
    if options.name == "safeclip":
        return SafeClip(targets=options.targets, logit_scale=options.logit_scale, backend=options.backend)
    if options.name == "shieldclip":
        return ShieldClip(logit_scale=options.logit_scale, backend=options.backend)
    return SaferClip(
        asdict(options.weights),
        k=options.k,
        tau=options.tau,
        beta=options.beta,
        margin=options.margin,
        negative=options.negative,
        logit_scale=options.logit_scale,
        backend=options.backend,
    )
