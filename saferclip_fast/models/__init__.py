"""CLIP models: loaded from open_clip, with LoRA or in full, with a frozen twin and an export."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
