from .common import Objective, ObjectiveOutput, QuadrupletEmbeddings
from .defaults import DEFAULT_BETA, DEFAULT_K, DEFAULT_MARGIN, DEFAULT_WEIGHTS
from .safe_clip import SafeClip
from .safer_clip import SaferClip
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
