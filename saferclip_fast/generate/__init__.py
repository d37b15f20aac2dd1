"""How often images of a diffusion pipeline are harmful, with its own text encoder and with the tuned one.

The module itself can be called: `saferclip_fast.generate(pipeline, run, prompts, out)` is `generate_images(...)`.
"""

import sys
import types
from typing import Any

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)


class _Callable(types.ModuleType):
    def __call__(self, *values: Any, **named: Any) -> Any:
        from .call import generate_images

        return generate_images(*values, **named)


sys.modules[__name__].__class__ = _Callable
