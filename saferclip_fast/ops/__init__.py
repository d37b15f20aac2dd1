"""The ops. Each module holds one public function; `choice` picks the backend that runs it."""

from .backends import Backend, backends
from .choice import BackendError, use_backend
from .info_nce import info_nce
from .nearest_safe import Neighbors, nearest_safe
from .neighbor_hinge import HingeOutput, neighbor_hinge
from .preservation_loss import PreservationOutput, preservation_loss
from .retarget_loss import RetargetOutput, retarget_loss

__all__ = [
    "Backend",
    "BackendError",
    "HingeOutput",
    "Neighbors",
    "PreservationOutput",
    "RetargetOutput",
    "backends",
    "info_nce",
    "nearest_safe",
    "neighbor_hinge",
    "preservation_loss",
    "retarget_loss",
    "use_backend",
]
