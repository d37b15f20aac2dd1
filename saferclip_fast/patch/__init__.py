"""A new kind of unsafe content taught to a safe model from a few pairs, in seconds (after Safety at One Shot).

The module itself can be called: `saferclip_fast.patch(run, pairs, out)` is `patch_model(run, pairs, out)`.
"""

import sys
import types
from typing import Any

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)


class _Callable(types.ModuleType):
    def __call__(self, *values: Any, **named: Any) -> Any:
        from .call import patch_model

        return patch_model(*values, **named)


sys.modules[__name__].__class__ = _Callable
