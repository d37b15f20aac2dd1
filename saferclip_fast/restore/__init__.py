"""Safety that a later fine-tuning took from a safe model, put back without training (SafeMERGE).

The module itself can be called: `saferclip_fast.restore(run, later, out)` is `restore_model(run, later, out)`.
"""

import sys
import types
from typing import Any

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)


class _Callable(types.ModuleType):
    def __call__(self, *values: Any, **named: Any) -> Any:
        from .call import restore_model

        return restore_model(*values, **named)


sys.modules[__name__].__class__ = _Callable
