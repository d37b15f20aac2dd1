"""A gate for each input: the frozen model's embedding, and the tuned model's only for what a guard finds unsafe.

After "gated adapters" (UpSafe, arXiv 2510.02194), on a guard; docs/gate.md. The module itself can be called:
`saferclip_fast.gate(run)` is `gate_model(run)`.
"""

import sys
import types
from typing import Any

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)


class _Callable(types.ModuleType):
    def __call__(self, *values: Any, **named: Any) -> Any:
        from .call import gate_model

        return gate_model(*values, **named)


sys.modules[__name__].__class__ = _Callable
