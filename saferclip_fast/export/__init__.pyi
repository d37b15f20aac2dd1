from .call import export_model
from .formats import FORMATS, ExportError, Source, Unsupported, export, load_source
from .hub import HubError
from .result import Exported

__all__ = [
    "FORMATS",
    "ExportError",
    "Exported",
    "HubError",
    "Source",
    "Unsupported",
    "export",
    "export_model",
    "load_source",
]
