from .formats import FORMATS, ExportError, Source, Unsupported, export, load_source

__all__ = [
    "FORMATS",
    "ExportError",
    "Source",
    "Unsupported",
    "export",
    "load_source",
]
