from .call import patch_model
from .result import Patched
from .spectrum import Spectrum

__all__ = ["Patched", "Spectrum", "patch_model"]
