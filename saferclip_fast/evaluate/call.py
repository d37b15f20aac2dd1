"""An evaluation from Python: what the command does, given values in place of words."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ..config import Config, ConfigError, Given, load_config
from ..data.labeled import open_labeled, readable_images
from ..data.memory import is_in_memory, keep
from ..data.open import check_source
from ..models import ClipModel
from ..sources import frozen_of, is_run, open_model
from ..storage.claim import claim
from ..storage.files import check_writable
from ..train.dataset import columns_of
from ..train.device import set_up_torch, settings_kept
from .bootstrap import CONFIDENCE, RESAMPLES
from .held_out import named, open_held_out, read_config
from .measurement import Known, dial_curve, evaluate
from .pictures import draw_dial
from .places import check_bound
from .result import Evaluation
from .task import Settings, Task
from .zero_shot import read_templates

Sources = Sequence[str] | Mapping[str, str | os.PathLike]  # "[NAME=]SOURCE", or sources by name
Model = str | os.PathLike | ClipModel


def evaluate_model(
    model: Model,
    data: Any = None,
    *,
    frozen: Model | None = None,
    images: Sources = (),
    templates: str | None = None,
    caption_images: Sources = (),
    dial: bool = False,
    max_loss: float | None = None,
    confidence: float = CONFIDENCE,
    out: str | os.PathLike | None = None,
    options: Given = (),
    device: str = "auto",
    precision: str = "fp32",
    batch_size: int = 256,
    samples: int = RESAMPLES,
    seed: int = 0,
    progress: bool = True,
) -> Evaluation:
    """Measure how safe and how useful a CLIP is, beside the frozen model it was tuned from: `sf.evaluate(...)`.

    Args:
        model: a run's folder or what `fine_tune` returned, an open_clip or Hugging Face folder, "NAME,PRETRAINED", or a
            model in memory (`load`, `load_clip`).
        data: held-out quadruplets, as `fine_tune` takes them; None: those that the run held out.
        frozen: the model to compare with; None: the one that a run started from, else none.
        images: zero-shot sets (class folders, shards, scenes:...); `templates` are prompts in place of their own.
        caption_images: folders of images: how many find an unsafe caption first among the quadruplets' captions.
        dial: measure along the safety dial too.
        max_loss, confidence: also choose the largest dial that loses at most max_loss (0.02: 2 points) of accuracy on
            every set of `images`, with that confidence (docs/evaluation.md); these need `dial`.
        out: folder for evaluation.json, which `report` reads, and the embeddings; None writes nothing.
        options: how the quadruplets are read, `data.*` of training; a run's own are the defaults.
        device, precision, batch_size: where and how embeddings are computed.
        samples, seed: resamples of the bootstrap, and its seed.
        progress: show bars.

    Returns:
        An Evaluation: `result["unsafe_rate@10"].tuned.value`, `print(result)`.

    Raises:
        ConfigError: an option that is none, or nothing to measure on.
        FileNotFoundError, DataError, ValueError: a model or data that is not there or of another kind.
        FrozenModelError: the run's frozen model is not the one that it was tuned from.
        InUseError: another process writes to `out`.
    """
    check_bound(dial, max_loss, confidence, images)
    path = model if isinstance(model, ClipModel) else os.fspath(model)
    folder = None if out is None else Path(out)
    config = read_config(path if isinstance(path, str) else "", options)
    config.log.progress = progress
    torch_config = load_config(None, {"device": device, "seed": seed}, "options")
    with (
        claim(folder) if folder else contextlib.nullcontext(),
        named_data(config, data),
        settings_kept(),
    ):
        place = set_up_torch(torch_config)
        tuned, beside, task = open_all(path, frozen, config, place, images, caption_images, templates, dial)
        settings = Settings(
            cache_dir=config.data.cache_dir,
            batch_size=batch_size,
            num_workers=config.data.num_workers,
            precision=precision,
            resamples=samples,
            seed=seed,
            progress=progress,
        )
        known: Known = {}
        found = evaluate(tuned, beside, task, settings, folder, known)
        curve = None
        if dial:
            assert beside is not None
            curve = dial_curve(
                tuned, beside, task, settings, folder, known=known, max_loss=max_loss, confidence=confidence
            )
            if folder:
                draw_dial(folder / "dial", curve)
    return Evaluation.read(found, curve, folder)


def open_all(
    model: str | ClipModel,
    frozen: Model | None,
    config: Config,
    device: torch.device,
    images: Sources,
    caption_images: Sources,
    templates: str | None,
    dial: bool,
) -> tuple[ClipModel, ClipModel | None, Task]:
    """The model, the one beside it, and the data to measure on; all of it is opened before anything is embedded."""
    if source := config.data.val or config.data.train:
        check_source(source, config.data.root or None)
    check_writable(config.data.cache_dir, "data.cache_dir")
    tuned, beside = open_models(model, frozen, device)
    if dial and beside is None:
        raise ConfigError("--dial goes from a frozen model to MODEL: name it with --frozen MODEL0")
    if dial:
        tuned.exported_state_dict()  # before anything slow: a gate has no weights to mix
    return tuned, beside, _read_task(config, tuned, _words(images), _words(caption_images), templates, dial)


def open_models(
    model: str | ClipModel, frozen: Model | None, device: torch.device
) -> tuple[ClipModel, ClipModel | None]:
    """The model, and the one beside it: that which `frozen` names, else the one that a run started from, else none."""
    tuned = _open(model, device)
    if frozen is not None:
        return tuned, _open(frozen if isinstance(frozen, ClipModel) else os.fspath(frozen), device)
    return tuned, frozen_of(model, device) if isinstance(model, str) and is_run(model) else None


def _open(model: str | ClipModel, device: torch.device) -> ClipModel:
    return open_model(model, device) if isinstance(model, str) else model.to(device).eval()


def _words(sources: Sources) -> list[str]:
    if isinstance(sources, str):
        return [sources]
    if isinstance(sources, Mapping):
        return [f"{name}={os.fspath(source)}" for name, source in sources.items()]
    return list(sources)


def _read_task(
    config: Config,
    clip: ClipModel,
    images: Sequence[str],
    caption_images: Sequence[str],
    templates: str | None,
    dial: bool,
) -> Task:
    prompts = read_templates(templates) if templates else None
    labeled = named(images, "--images", open_labeled)
    real = named(
        caption_images,
        "--caption-images",
        lambda folder, name: readable_images(folder, config.data.on_error, config.log.progress),
    )
    held_out = open_held_out(config, clip)
    if held_out is None and real:
        raise ConfigError("--caption-images are matched with the captions of quadruplets: name some with --data SOURCE")
    if held_out is None and dial:
        raise ConfigError("--dial is drawn over retrieval: name held-out quadruplets with --data SOURCE")
    if held_out is not None and held_out.quadruplets.text_only and dial:
        raise ConfigError("the safety dial needs unsafe images, and these quadruplets have none (data.text_only)")
    if held_out is None and not labeled:
        raise ConfigError("nothing to measure on: name quadruplets (--data SOURCE) or zero-shot sets (--images SOURCE)")
    return Task(
        quadruplets=held_out and held_out.quadruplets,
        zero_shot=list(labeled.values()),
        templates=prompts,
        images=real,
        captions=held_out and held_out.captions,
    )


@contextlib.contextmanager
def named_data(config: Config, data: Any) -> Iterator[None]:
    """Inside, `config` names `data`, from a temporary folder where it was in memory; None leaves it as it is."""
    with tempfile.TemporaryDirectory() as folder:
        if data is not None and is_in_memory(data):
            kept = keep(data, folder, columns_of(config), config.data.root, config.log.progress, config.data.text_only)
            config.data.val, config.data.root = kept
        elif data is not None:
            config.data.val = os.fspath(data)
        yield
