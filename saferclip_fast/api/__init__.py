"""The whole job from Python: saferclip_fast.fine_tune."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
