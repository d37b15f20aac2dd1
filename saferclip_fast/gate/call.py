"""A gate from Python: made of a run, and measured as the command does it."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..config import Given, load_config
from ..evaluate import Known, Settings, evaluate
from ..evaluate.bootstrap import RESAMPLES
from ..evaluate.call import Sources, named_data, open_all
from ..evaluate.held_out import read_config
from ..evaluate.result import Evaluation
from ..guard import Guard, load_guard
from ..guard.model import MODALITIES
from ..models import ClipModel
from ..results import GATE_CURVE
from ..sources import open_model
from ..storage.claim import claim
from ..train.device import set_up_torch, settings_kept
from .curve import check_task, gate_curve
from .folder import load_gate
from .model import GatedModel, GateError
from .picture import draw_curve
from .places import check_new, check_source, check_threshold, is_gate


def gate_model(
    tuned: str | os.PathLike | ClipModel,
    guard: Guard | None = None,
    threshold: float | None = None,
    device: str | torch.device | None = None,
) -> GatedModel:
    """A model that embeds with the tuned weights only what the guard finds unsafe: `sf.gate(...)`.

    Args:
        tuned: the folder of a run, or what `fine_tune` returned; with `guard` also what else `evaluate` takes as a
            model, or one in memory.
        guard: the guard, with the frozen model that the tuned one came from; None: the run's, of `fit_guard`.
        threshold: inputs with P(unsafe) at or over it go to the tuned model: 0 all, 1 none. None: the guard's for each
            modality, the least that at most 0.5 % of its safe validation items lie at or over.
        device: where both models go; None: where the guard is, else the CPU.

    Returns:
        A GatedModel, used as an open_clip model: `encode_image`, `encode_text`, `preprocess`, `tokenizer`.

    Raises:
        FileNotFoundError: no run, or no guard.
        GateError: models that do not belong together, or a guard from before guards chose thresholds.
        ValueError: a threshold that is no probability, or a model in memory without a guard.
        FrozenModelError, GuardError: another frozen model than the run's, or than the guard's.
    """
    check_threshold(threshold)
    if guard is None:
        if isinstance(tuned, ClipModel):
            raise ValueError("a model in memory leads to no guard: give guard=sf.load_guard(RUN)")
        check_source(Path(tuned))
        guard = load_guard(tuned, device=device)
    elif device is not None:
        guard.clip.to(device)
        for head in filter(None, (guard.text, guard.image)):
            head.to(device)
    thresholds = _chosen(guard) if threshold is None else dict.fromkeys(MODALITIES, threshold)
    clip = tuned if isinstance(tuned, ClipModel) else open_model(os.fspath(tuned), guard.clip.device)
    return GatedModel(guard, clip, thresholds)


def _chosen(guard: Guard) -> dict[str, float]:
    """The thresholds of guard.json; 1, so that nothing is sent, of a modality that the guard does not know."""
    entries: Mapping[str, Any] = guard.figures["modalities"]
    if lacking := [name for name, entry in entries.items() if "gate" not in entry]:
        raise GateError(
            f"this guard chose no threshold for {' and '.join(lacking)}, as guards did not before there were gates: "
            "fit it again with saferclip guard RUN, or give --threshold"
        )
    return {name: entries[name]["gate"]["threshold"] if name in entries else 1.0 for name in MODALITIES}


class MeasuredGate(NamedTuple):
    """A gate, its evaluation beside the frozen model, and its curve."""

    gated: GatedModel
    evaluation: Evaluation
    curve: dict[str, Any]  # docs/gate.md


def measure_gate(
    source: str | os.PathLike,
    out: str | os.PathLike,
    data: Any = None,
    *,
    threshold: float | None = None,
    images: Sources = (),
    options: Given = (),
    device: str = "auto",
    batch_size: int = 256,
    samples: int = RESAMPLES,
    seed: int = 0,
    progress: bool = True,
) -> MeasuredGate:
    """Save the gate of a run and measure it, at its threshold and along others: what `saferclip gate` does.

    Args:
        source: the folder of a run with a guard, or of a gate, which is not saved again.
        out: a new or empty folder: the gate (see GatedModel.save), evaluation.json and the embeddings, which `report`
            reads, gate-curve.json, .png and .svg.
        data: held-out quadruplets, as `evaluate` takes them; None: those that the run held out.
        threshold: of texts and images; None: the guard's, or those that the gate was saved with.
        images: zero-shot sets, as `evaluate` takes them.
        options: how the quadruplets are read, `data.*` of training; the run's own are the defaults.
        device, batch_size: where and how embeddings are computed.
        samples, seed: resamples of the bootstrap, and its seed.
        progress: show bars.

    Raises:
        As gate_model, load_gate and evaluate; FileExistsError where `out` holds files.
    """
    path, folder = Path(source), Path(out)
    check_threshold(threshold)
    check_source(path)
    check_new(folder)
    config = read_config(str(path), options)
    config.log.progress = progress
    torch_config = load_config(None, {"device": device, "seed": seed}, "options")
    with claim(folder), named_data(config, data), settings_kept(), tempfile.TemporaryDirectory() as once:
        place = set_up_torch(torch_config)
        saved = is_gate(path)
        gated = load_gate(path, threshold, place) if saved else gate_model(path, None, threshold, place)
        frozen = gated.guard.clip
        _, _, task = open_all(gated, frozen, config, place, images, (), None, False)
        check_task(task)
        if not saved:
            gated.save(folder)
        # a cache of its own: what another batch size left elsewhere may be rounded otherwise
        settings = Settings(once, batch_size, config.data.num_workers, resamples=samples, seed=seed, progress=progress)
        known: Known = {}
        found = evaluate(gated, frozen, task, settings, folder, known)
        curve = gate_curve(gated, task, settings, folder, known=known)
        draw_curve(folder / GATE_CURVE, curve)
    return MeasuredGate(gated, Evaluation.read(found, None, folder), curve)
