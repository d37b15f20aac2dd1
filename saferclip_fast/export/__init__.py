"""A fine-tuned model in the formats that other software reads, each read back and compared before it counts.

The module itself can be called: `saferclip_fast.export(run, out)` is `export_model(run, out)`.
"""

import sys
import types
from typing import Any

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)


class _Callable(types.ModuleType):
    def __call__(self, *values: Any, **named: Any) -> Any:
        from .call import export_model

        return export_model(*values, **named)


sys.modules[__name__].__class__ = _Callable
