from .checks import Check, self_check
from .machine import describe

__all__ = [
    "Check",
    "describe",
    "self_check",
]
