"""Which paths compute less, or something else, than ours: file of results -> path -> what differs.

The tables mark them (render.py). A name stands for all paths that begin with it and an underscore, unless a longer one
does: `chunked` for chunked_2048.
"""

from __future__ import annotations

_ROUNDED = "scores summed in float32, no rule for ties"
_SEARCHES = {
    **dict.fromkeys(("eager", "compiled", "chunked", "best_torch", "faiss"), _ROUNDED),
    "faiss_panorama": f"{_ROUNDED}; rows are left out by bounds in float32, without a proof that none is missed",
    "numkong": "scores summed in double, no rule for ties",
    "int8_mm": "the products of an int8 screen alone, no search",
}
_PRODUCTS = "the matrix products alone"
DIFFERS = {
    **dict.fromkeys(
        ("nearest_safe", "nearest_safe_curves", "nearest_safe_million", "nearest_safe_panorama"), _SEARCHES
    ),
    "bank": {
        **dict.fromkeys(("eager", "compiled"), "pack: int8 rows without error bounds or a layout for the kernels"),
        "copy": "a copy of the rows alone",
    },
    "info_nce": {"products": _PRODUCTS},
    "preservation_loss": {"products": _PRODUCTS},
    "retarget_loss": {"copy": "a copy of the bytes alone"},
    "objective": dict.fromkeys(("ours_guard", "ours_redirection", "ours_preservation"), "a part of ours alone"),
}


def difference(name: str, path: str) -> str | None:
    """What differs in `path` of the file `name`; None where it computes the same."""
    known = DIFFERS.get(name, {})
    parts = path.split("_")
    longest_first = ("_".join(parts[:end]) for end in range(len(parts), 0, -1))
    return next((known[part] for part in longest_first if part in known), None)
