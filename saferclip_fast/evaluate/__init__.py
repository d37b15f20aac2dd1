"""Evaluate a CLIP for safety and usefulness, alone or beside the frozen model it was tuned from.

The module itself can be called: `saferclip_fast.evaluate(run)` is `evaluate_model(run)`. The command line is
__main__.py; docs/evaluation.md says what is measured.
"""

import sys
import types
from typing import Any

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)


class _Callable(types.ModuleType):
    def __call__(self, *values: Any, **named: Any) -> Any:
        from .call import evaluate_model

        return evaluate_model(*values, **named)


sys.modules[__name__].__class__ = _Callable
