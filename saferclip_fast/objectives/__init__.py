"""The training objectives, as nn.Modules made of the ops; all are called alike, so that the loop has one switch."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
