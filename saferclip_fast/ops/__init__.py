"""The three ops. Each module holds one public function; `backends` chooses which implementation runs it."""

from .backends import Backend, backends
from .nearest_safe import Neighbors, nearest_safe
from .preservation_loss import PreservationOutput, preservation_loss
from .retarget_loss import RetargetOutput, retarget_loss

__all__ = [
    "Backend",
    "Neighbors",
    "PreservationOutput",
    "RetargetOutput",
    "backends",
    "nearest_safe",
    "preservation_loss",
    "retarget_loss",
]
