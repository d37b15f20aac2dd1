"""P(unsafe) of a text or an image, from a frozen model's embeddings (HoliSafe, arXiv 2506.04704).

The tuned model's embeddings have had the signal removed; the frozen ones still tell. docs/guard.md.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
