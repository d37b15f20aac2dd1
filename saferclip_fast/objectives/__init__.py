"""The training objectives, as nn.Modules made of the ops; all are called alike, so that the loop has one switch."""

from .common import Objective, ObjectiveOutput, QuadrupletEmbeddings
from .safe_clip import SafeClip
from .safer_clip import DEFAULT_BETA, DEFAULT_K, DEFAULT_MARGIN, DEFAULT_WEIGHTS, SaferClip
from .shield_clip import ShieldClip

__all__ = [
    "DEFAULT_BETA",
    "DEFAULT_K",
    "DEFAULT_MARGIN",
    "DEFAULT_WEIGHTS",
    "Objective",
    "ObjectiveOutput",
    "QuadrupletEmbeddings",
    "SafeClip",
    "SaferClip",
    "ShieldClip",
]
