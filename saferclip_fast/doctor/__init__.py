"""What works on this machine: versions, memory, backends, and a self-check of the ops."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
