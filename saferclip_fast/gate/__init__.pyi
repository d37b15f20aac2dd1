from .call import MeasuredGate, gate_model, measure_gate
from .curve import THRESHOLDS, gate_curve
from .folder import load_gate
from .model import GatedModel, GateError

__all__ = [
    "THRESHOLDS",
    "GateError",
    "GatedModel",
    "MeasuredGate",
    "gate_curve",
    "gate_model",
    "load_gate",
    "measure_gate",
]
