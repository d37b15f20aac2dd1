"""SafeR-CLIP fine-tuning with fused kernels: exact nearest-safe search, redirection and preservation losses."""

import lazy_loader

from .version import __version__

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
__all__ += ["__version__"]
