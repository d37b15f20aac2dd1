"""An export from Python: what the command does, given values in place of words."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from ..models import ClipModel
from ..sources import Source, load_source
from ..storage.claim import claim
from .formats import FORMATS, export
from .hub import check_hub, push
from .names import NAMES
from .result import Exported


def export_model(
    model: str | os.PathLike | ClipModel,
    out: str | os.PathLike,
    formats: str | Sequence[str] = "huggingface",
    *,
    dial: float = 1.0,
    overwrite: bool = False,
    push_to_hub: str | None = None,
    private: bool = False,
) -> dict[str, Exported]:
    """Write a model for other software, each format read back and compared before it counts: `sf.export(...)`.

    Args:
        model: a run's folder or what `fine_tune` returned, an open_clip or Hugging Face folder, or a model in memory.
        out: each format goes to OUT/FORMAT.
        formats: one or several of open_clip, huggingface, peft and onnx (docs/export.md says what each can hold).
        dial: the safety dial, 0 frozen, 1 as trained; other than 1 for runs only.
        overwrite: replace OUT/FORMAT where it is there.
        push_to_hub: NAME or OWNER/NAME of a repository on the Hugging Face hub, made where it is missing, that the
            export is sent to; one format lies at its top, several in folders.
        private: whether a new repository is private.

    Returns:
        Folder and largest difference, by format.

    Raises:
        ValueError: an unknown format, a dial without frozen weights.
        Unsupported: a format that the model does not have.
        FileNotFoundError: no model there, or a run that has not come to its end.
        FileExistsError: OUT/FORMAT is there, and `overwrite` is false; nothing was written.
        ExportError: what was written computes something else; it was removed.
        FrozenModelError: another frozen model than the run was tuned from.
        GateError: a gated model, which no one set of weights is.
        HubError: the hub does not know you, or did not take the export, which is whole.
    """
    names = list(dict.fromkeys([formats] if isinstance(formats, str) else formats))
    if unknown := [name for name in names if name not in FORMATS]:
        raise ValueError(f"no format {', '.join(map(repr, unknown))}; there are {', '.join(NAMES)}")
    if isinstance(model, ClipModel) and dial != 1:
        raise ValueError(f"dial={dial} needs the frozen weights too: give the run's folder, or load(run, dial={dial})")
    folder = Path(out)
    if push_to_hub is not None:
        check_hub(push_to_hub)
    with claim(folder):
        if isinstance(model, ClipModel):
            model.exported_state_dict()  # before anything is written: a gate has none
            source = Source(model, Path(model.name))
        else:
            source = load_source(Path(model), alpha=dial)
        differences = export(source, names, folder, overwrite)
        if push_to_hub is not None:
            push(folder, names, push_to_hub, private)
    return {name: Exported(folder / name, difference) for name, difference in differences.items()}
