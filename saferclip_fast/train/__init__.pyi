from .callbacks import Callbacks, StepInfo, StopTraining, ValidationInfo
from .state import Progress, RunState
from .trainer import Trainer, TrainResult, train

__all__ = [
    "Callbacks",
    "Progress",
    "RunState",
    "StepInfo",
    "StopTraining",
    "TrainResult",
    "Trainer",
    "ValidationInfo",
    "train",
]
