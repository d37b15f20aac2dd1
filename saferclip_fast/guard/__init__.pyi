from .call import fit_guard, load_guard
from .model import Guard, GuardError, Head

__all__ = [
    "Guard",
    "GuardError",
    "Head",
    "fit_guard",
    "load_guard",
]
