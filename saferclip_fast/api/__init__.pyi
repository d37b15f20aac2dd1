from .result import FineTuned
from .run import fine_tune

__all__ = [
    "FineTuned",
    "fine_tune",
]
