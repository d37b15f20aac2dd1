from .formats import FORMATS, ExportError, Source, Unsupported, compare, export, load_source

__all__ = [
    "ExportError",
    "FORMATS",
    "Source",
    "Unsupported",
    "compare",
    "export",
    "load_source",
]
