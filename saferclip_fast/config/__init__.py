"""The options of a training run: what they are (options.py), and reading them (reading.py)."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
