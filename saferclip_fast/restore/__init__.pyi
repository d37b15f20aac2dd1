from .call import restore_model
from .result import Layer, Restored

__all__ = ["Layer", "Restored", "restore_model"]
