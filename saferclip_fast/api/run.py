"""One call that fine-tunes: the options of the command line, the same training run."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ..config import Config, ConfigError, Given, load_config, pairs
from ..sources import load
from ..storage.claim import claim
from ..train import Callbacks, StepInfo, TrainResult, ValidationInfo, train
from ..train.device import settings_kept
from ..train.run_folder import check_unused
from .inputs import check_sources, name_data, name_model
from .result import FineTuned, metrics_of

_ARGUMENTS = {"model.name": "model", "model.pretrained": "model", "data.train": "data", "data.val": "validation"}


def fine_tune(
    model: Any,
    data: Any,
    *,
    validation: Any = None,
    preset: str | os.PathLike | None = None,
    options: Given | None = None,
    run_dir: str | os.PathLike | None = None,
    on_step: Callable[[StepInfo], object] | None = None,
    on_validation: Callable[[ValidationInfo], object] | None = None,
    on_end: Callable[[FineTuned], object] | None = None,
) -> FineTuned:
    """Fine-tune a CLIP for safety: what `saferclip train` does, from Python.

    Args:
        model: "NAME,PRETRAINED" or (name, pretrained) as open_clip has them; a folder (a run, an open_clip model, a
            Hugging Face CLIPModel); a model of `load_clip`; or (open_clip model, its architecture's name). A model in
            memory stays as it is; its weights are written to RUN_DIR/pretrained.
        data: quadruplets: a path or source as `data.train` takes it, a pandas DataFrame, a list of dicts, or a data set
            of dicts, each with `safe_image`, `unsafe_image`, `safe_text`, `unsafe_text`, and optionally
            `unsafe_text_label`, `unsafe_image_label` (docs/python.md). What is in memory is written to RUN_DIR/data.
        validation: the same, to validate on; None: a share of `data` is held out (`data.val_fraction`).
        preset: a YAML file of options, or the name of a shipped one ("paper").
        options: any option of the command line over those: {"train.epochs": 3}, {"train": {"epochs": 3}} or
            ["train.epochs=3"].
        run_dir: the run's folder (default: the option `run_dir`, runs/train).
        on_step, on_validation: called after each step and each validation; `train.StopTraining`, raised there, ends
            training early, and the result is that of the steps so far.
        on_end: called with the result.

    Returns:
        The tuned model with its preprocessing and tokenizer, the run's folder and metrics, on the device that trained.

    Raises:
        ConfigError: an option that does not exist (with the nearest one), a value out of range (with the range), an
            option that an argument says; known before anything is loaded.
        TypeError, ValueError, FileNotFoundError, DataError: a model or data of another kind, or not there.
        CheckpointError: `run_dir` holds a run; options={"resume": "auto"} goes on with it.
        KeyboardInterrupt: Ctrl-C; the step in progress was saved.
    """
    config = _config(preset, options, run_dir)
    folder = Path(config.run_dir)
    with claim(folder), settings_kept():
        check_unused(config)
        check_sources(config, data, validation)
        name_model(config, model)
        name_data(config, data, validation)
        result = train(config, Callbacks(on_step, on_validation))
        if result.weights is None:
            _stop(result, folder)
        metrics = metrics_of(folder, result.progress, config.validation.final == "best")
        tuned = FineTuned(load(folder, device=_device(config)), folder, metrics)
    if on_end:
        on_end(tuned)
    return tuned


def _config(preset: str | os.PathLike | None, options: Given | None, run_dir: str | os.PathLike | None) -> Config:
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError("fine_tune is one process: torchrun --nproc-per-node=N -m saferclip_fast.train has several")
    given = options or ()
    for key, _ in pairs(given):
        if key in _ARGUMENTS:
            raise ConfigError(f"options: {key} is what the argument {_ARGUMENTS[key]!r} says: leave it out here")
    config = load_config(os.fspath(preset) if preset is not None else None, given, "options")
    if run_dir is not None:
        config.run_dir = os.fspath(run_dir)
    return config


def _stop(result: TrainResult, folder: Path) -> None:
    """Raise what the signal that ended the run asks for."""
    if result.stopped_by == signal.SIGINT:
        raise KeyboardInterrupt(f"saved; fine_tune with options={{'resume': 'auto'}} goes on with {folder}")
    raise SystemExit(128 + result.stopped_by)


def _device(config: Config) -> torch.device:
    name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name if config.device == "auto" else config.device)
