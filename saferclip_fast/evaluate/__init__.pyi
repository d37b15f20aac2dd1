from .beside_published import PublishedTable, TableRow, published_table
from .call import evaluate_model
from .measurement import ALPHAS, Known, check_same_space, dial_curve, evaluate, measure
from .result import DialPoint, Estimate, Evaluation, Figure
from .summary import KEY_METRICS, Measured, estimates, summarize, write
from .tables import comparison, label_tables, table
from .task import CaptionBank, Settings, Task

__all__ = [
    "ALPHAS",
    "KEY_METRICS",
    "CaptionBank",
    "DialPoint",
    "Estimate",
    "Evaluation",
    "Figure",
    "Known",
    "Measured",
    "PublishedTable",
    "Settings",
    "TableRow",
    "Task",
    "check_same_space",
    "comparison",
    "dial_curve",
    "estimates",
    "evaluate",
    "evaluate_model",
    "label_tables",
    "measure",
    "published_table",
    "summarize",
    "table",
    "write",
]
