from .bank import SafeBank
from .ops import (
    Backend,
    BackendError,
    Neighbors,
    PreservationOutput,
    RetargetOutput,
    backends,
    info_nce,
    nearest_safe,
    preservation_loss,
    retarget_loss,
    use_backend,
)
from .version import __version__

__all__ = [
    "Backend",
    "BackendError",
    "Neighbors",
    "PreservationOutput",
    "RetargetOutput",
    "SafeBank",
    "__version__",
    "backends",
    "info_nce",
    "nearest_safe",
    "preservation_loss",
    "retarget_loss",
    "use_backend",
]
