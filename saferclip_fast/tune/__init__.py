"""Measure every op's backends on this machine and keep what is fastest."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
