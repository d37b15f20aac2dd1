"""Models and data as a caller in Python has them, as options of a run."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from torch import nn

from ..config import Config, ConfigError
from ..data.memory import Kept, is_in_memory, keep
from ..data.open import check_source
from ..models import CONFIG_NAME, ClipModel
from ..models.keep import adopt, keep_model
from ..sources import is_run, load_source
from ..train.dataset import columns_of
from ..train.frozen import KEPT

MODELS = "a name and a tag ('ViT-B-32-quickgelu', 'openai'), a folder, a model of load_clip, or (open_clip model, name)"


def name_model(config: Config, model: Any) -> None:
    """Write into `config` where `model` is loaded from. One in memory is kept in the run's folder first.

    Raises TypeError for what is no model, ValueError for a model that is not of its name.
    """
    options = config.model
    if isinstance(model, str | os.PathLike):
        options.name, options.pretrained = _named(config, os.fspath(model))
        return
    if isinstance(model, ClipModel):
        options.name, options.pretrained = _kept(config, model), ""
        return
    if isinstance(model, tuple) and len(model) == 2 and isinstance(model[1], str):
        first, second = model
        if isinstance(first, str):
            options.name, options.pretrained = first, second
            return
        if isinstance(first, nn.Module):
            options.name, options.pretrained = _kept(config, adopt(first, second)), ""
            return
    what = type(model).__name__
    if isinstance(model, nn.Module) or (isinstance(model, tuple) and model and isinstance(model[0], nn.Module)):
        raise TypeError(
            f"{what}: a model in memory does not say its architecture, which every later step needs: give "
            "(model, 'NAME') with open_clip's name of it; preprocessing and tokenizer follow"
        )
    raise TypeError(f"model is a {what}: give {MODELS}")


def check_sources(config: Config, *sources: Any) -> None:
    """What can be known of data that is not in memory, before a model is loaded. Raises as check_source does."""
    for source in sources:
        if source is not None and not is_in_memory(source):
            check_source(os.fspath(source), config.data.root or None)


def name_data(config: Config, data: Any, validation: Any) -> None:
    """Write into `config` where the data lies. What is in memory is kept in the run's folder first.

    Raises ConfigError where images of the two lie in different folders.
    """
    roots = []
    for option, value in (("train", data), ("val", validation)):
        if value is None:
            continue
        place = _place(config, value)
        setattr(config.data, option, place.source)
        roots.append(place.root)
    if len(set(roots)) > 1:
        raise ConfigError(
            "data and validation have their images in different places, and data.root is one folder: give both as "
            "paths, or both with their images in memory"
        )
    config.data.root = roots[0]


def _place(config: Config, value: Any) -> Kept:
    options = config.data
    if not is_in_memory(value):
        return Kept(os.fspath(value), options.root)
    folder = Path(config.run_dir) / "data"
    return keep(value, folder, columns_of(config), options.root, config.log.progress, options.text_only)


def _named(config: Config, model: str) -> tuple[str, str]:
    """(name, pretrained) of a folder, or of "NAME,PRETRAINED"."""
    folder = Path(model)
    if not folder.is_dir():
        name, _, pretrained = model.partition(",")
        return name, pretrained
    if is_run(model):
        load = folder / "final"
    elif (folder / CONFIG_NAME).is_file():
        load = folder
    else:  # a Hugging Face CLIPModel
        return _kept(config, load_source(folder).clip), ""
    return f"local-dir:{load}", ""


def _kept(config: Config, clip: ClipModel) -> str:
    return f"local-dir:{keep_model(clip, Path(config.run_dir) / KEPT)}"
