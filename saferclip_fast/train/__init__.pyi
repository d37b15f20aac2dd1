from .state import Progress, RunState
from .trainer import Trainer, TrainResult, train

__all__ = [
    "Progress",
    "RunState",
    "TrainResult",
    "Trainer",
    "train",
]
