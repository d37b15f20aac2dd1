"""Evaluate a CLIP for safety and usefulness, alone or beside the frozen model it was tuned from.

The command line is __main__.py; docs/evaluation.md says what is measured.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
