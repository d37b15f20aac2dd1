from .callbacks import Callbacks, StepInfo, ValidationInfo
from .state import Progress, RunState
from .trainer import Trainer, TrainResult, train

__all__ = [
    "Callbacks",
    "Progress",
    "RunState",
    "StepInfo",
    "TrainResult",
    "Trainer",
    "ValidationInfo",
    "train",
]
