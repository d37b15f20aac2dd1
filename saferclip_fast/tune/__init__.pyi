from .tuning import measure, tune

__all__ = [
    "measure",
    "tune",
]
