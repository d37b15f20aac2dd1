"""The folder of a patched model: whole, or no model."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from typing import Any

from ..models import CONFIG_NAME
from ..storage.files import save_json, sync
from .picture import draw_energy
from .places import STAGE
from .result import Patched
from .spectrum import RANKS, of_all

FORMAT = "saferclip_fast.patch.v1"


def write(found: Patched, recipe: Mapping[str, Any]) -> None:
    """Writes weights, patch.json and energy.png to `found.out`.

    All are written to a folder inside it and then moved out, open_clip's configuration last: without it a folder is no
    model.
    """
    stage = found.out / STAGE
    shutil.rmtree(stage, ignore_errors=True)  # of a process that was killed: this one has claimed `out`
    try:
        save_json(stage / "patch.json", _described(found, recipe))
        draw_energy(stage / "energy.png", found.spectra)
        found.model.export(stage)
        for file in sorted(stage.iterdir(), key=lambda file: file.name == CONFIG_NAME):
            file.replace(found.out / file.name)
        sync(found.out)
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def _described(found: Patched, recipe: Mapping[str, Any]) -> dict[str, Any]:
    layers = [layer._asdict() for layer in found.spectra]
    energy = {"ranks": RANKS, "all": of_all(found.spectra), "layers": layers}
    return {
        "format": FORMAT,
        "pairs": found.pairs,
        "part": found.part,
        "figures": found.figures,
        "seconds": found.seconds,
        "recipe": dict(recipe),
        "weights_hash": found.model.weights_hash,
        "energy": energy,
    }
