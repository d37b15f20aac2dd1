"""One self-contained HTML page on a run, or on several side by side: what changed, by how much, how sure that is.

Data flows one way: load (a run's folder) -> words, figures (what is said and drawn) -> page (the template).
The page fetches nothing: style, script, figures and data are inside, and its Content-Security-Policy allows no more.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from ..storage.files import atomic_write
from . import figures, words
from .load import Run, load_runs
from .maps import embedding_map

__all__ = ["load_runs", "render", "write"]

FOLDER = Path(__file__).parent


def write(folders: Sequence[str | Path] | Mapping[str, str | Path], out: str | Path) -> None:
    """Renders the runs in `folders`, which may have names, to the file `out`, atomically.

    Raises ValueError or OSError naming what to do.
    """
    page = render(load_runs(folders))
    with atomic_write(out) as temporary:
        temporary.write_text(page, encoding="utf-8", errors="replace")  # JSON may hold lone surrogates


def render(runs: Sequence[Run]) -> str:
    """The page. Raises ValueError where `runs` is empty."""
    if not runs:
        raise ValueError("there is no run to report on")
    return fill(
        FOLDER,
        "page",
        runs=runs,
        color=figures.color,
        shared=figures.same_frozen(runs),
        comparable=figures.same_data(runs),
        retrieval=figures.retrieval(runs),
        losses=figures.losses(runs),
        maps=[embedding_map(run) for run in runs],
        tradeoff=figures.tradeoff(runs),
        guards=[figures.guard(run) for run in runs],
        gates=[figures.gate(run) for run in runs],
        restorations=[figures.restored(run) for run in runs],
        data=_finite([_cases(run) for run in runs]),
        pictures=[base64.b64encode(run.picture).decode() if run.picture else "" for run in runs],
    )


def fill(folder: Path, name: str, **values: Any) -> str:
    """The page of FOLDER/NAME.html with the report's words and style and the script FOLDER/NAME.js inside.

    Args:
        values: what the template names; it may import parts.html.
    """
    script = (folder / f"{name}.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return (
        _environment(folder)
        .get_template(f"{name}.html")
        .render(
            words=words,
            css=Markup((FOLDER / "page.css").read_text(encoding="utf-8")),
            script=Markup(script),
            script_hash=f"sha256-{digest}",
            **values,
        )
    )


@functools.cache
def _environment(folder: Path) -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader([folder, FOLDER]),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _cases(run: Run) -> dict[str, Any]:
    """The cases that the page's script lists."""
    lists = {name: run.evaluation.get(name, []) for name in ("examples", "worst_cases")}
    return {"sides": run.sides, **lists}


def _finite(value: Any) -> Any:
    """NaN and infinities as null: JSON has no word for them."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
