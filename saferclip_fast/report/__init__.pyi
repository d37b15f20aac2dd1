from .load import load_runs
from .page import render, write

__all__ = [
    "load_runs",
    "render",
    "write",
]
