"""A model in memory, written to a folder that load_clip opens."""

from __future__ import annotations

import contextlib
import re
import tempfile
from pathlib import Path

import open_clip
import torch
from torch import nn

from ..storage.files import save_json, save_tensors
from .clip import CONFIG_NAME, WEIGHTS_NAME, ClipModel
from .loading import load_clip

_SAME = 1e-3  # relative distance of an embedding; half-precision weights round by less, another activation is 5e-3


def keep_model(clip: ClipModel, folder: str | Path) -> Path:
    """Write `clip`, adapters merged, to FOLDER/NAME-HASH (of its weights); returns that folder, for "local-dir:"."""
    name = re.sub(r"[^\w.-]+", "-", clip.name)
    place = Path(folder) / f"{name}-{clip.hash_weights()[:8]}"
    if not (place / WEIGHTS_NAME).is_file() or not (place / CONFIG_NAME).is_file():
        clip.export(place)
    return place


def adopt(model: nn.Module, name: str) -> ClipModel:
    """A ClipModel with the weights of `model`, an open_clip model of the architecture `name`; `model` stays as it is.

    Preprocessing is what open_clip noted in the model, the tokenizer is the architecture's.

    Raises ValueError where `name` is unknown, or does not compute what `model` computes.
    """
    config = open_clip.get_model_config(name)
    if config is None:
        raise ValueError(f"unknown model {name!r}; open_clip.list_models() lists them")
    if not hasattr(model, "encode_image") or not hasattr(model, "encode_text"):
        raise ValueError(f"a {type(model).__name__} is no open_clip model: it has no encode_image and encode_text")
    with tempfile.TemporaryDirectory() as folder:
        state = {name: value.float() if value.is_floating_point() else value for name, value in _state(model).items()}
        save_tensors(Path(folder) / WEIGHTS_NAME, state, {"format": "pt"})
        preprocess = open_clip.get_model_preprocess_cfg(model)
        save_json(Path(folder) / CONFIG_NAME, {"model_cfg": config, "preprocess_cfg": preprocess})
        clip = load_clip(f"local-dir:{folder}")
    clip.name = name
    if (distance := _distance(model, clip)) > _SAME:
        raise ValueError(
            f"the model does not compute what {name} computes with its weights (embeddings differ by {distance:.1e}): "
            "give the name that it was made with, e.g. one that ends in -quickgelu"
        )
    return clip


def _state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.detach().cpu().clone() for name, value in model.state_dict().items()}


@torch.no_grad()
def _distance(model: nn.Module, clip: ClipModel) -> float:
    """The largest relative distance of what both make of fixed pixels and a caption."""
    size = clip.preprocessing["size"]
    height, width = (size, size) if isinstance(size, int) else size
    pixels = torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(0))
    tokens = clip.tokenizer(["a dog runs over the grass"])
    inputs = next(model.parameters())
    with _evaluating(model):
        theirs = (
            model.encode_image(pixels.to(inputs.device, inputs.dtype)),  # type: ignore[operator]
            model.encode_text(tokens.to(inputs.device)),  # type: ignore[operator]
        )
    distances = ((a.float().cpu() - b).norm() / b.norm() for a, b in zip(theirs, clip(pixels, tokens), strict=True))
    return max(map(float, distances))


@contextlib.contextmanager
def _evaluating(model: nn.Module):
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, was in training.items():
            module.training = was
