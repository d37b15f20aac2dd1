"""One self-contained HTML page on a run, or on several side by side.

Data flows one way: load (a run's folder) -> words, figures (what is said and drawn) -> page (the template).
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
