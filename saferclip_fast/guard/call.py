"""A guard of a run: fitted on its data and written into its folder, and read back."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..config import Config, ConfigError, Given, load_config
from ..data import DataError, QuadrupletDataset
from ..data.quadruplets import QuadrupletEmbeddings
from ..embeddings import embed_quadruplets
from ..evaluate.bootstrap import CONFIDENCE, RESAMPLES
from ..evaluate.held_out import read_config
from ..models import ClipModel
from ..results import GUARD_FORMAT
from ..runtime.precision import native_precision
from ..sources import frozen_of, is_run, open_model
from ..storage.claim import claim
from ..storage.files import check_writable, save_json
from ..train.dataset import open_data, split_rows
from ..train.device import set_up_torch, settings_kept
from .figures import at_gate, figures_of, gate_threshold
from .fit import Items, fit_head
from .model import FILE, MODALITIES, Guard, Head
from .place import check_run

FIGURES = "guard.json"


class Part(NamedTuple):
    """Rows of quadruplets in the frozen model's embeddings, and what their unsafe side is."""

    source: str
    embeddings: QuadrupletEmbeddings  # [N, d] each
    text_is_unsafe: Tensor  # int64 [N]
    image_is_unsafe: Tensor  # int64 [N]

    def rows(self, index: Tensor, source: str) -> Part:
        """The rows `index`, int64 [n]."""
        embeddings = QuadrupletEmbeddings(*(column[index] for column in self.embeddings))
        return Part(source, embeddings, self.text_is_unsafe[index], self.image_is_unsafe[index])

    def items(self, modality: str) -> Items:
        """Its texts or images, safe and unsafe."""
        return Items.of(modality, self.embeddings, getattr(self, f"{modality}_is_unsafe"))


class Parts(NamedTuple):
    """What a guard is fitted on, what stops, chooses and calibrates it, and what chooses nothing."""

    train: Part
    validation: Part
    test: Part


def fit_guard(
    run: str | os.PathLike,
    data: str | os.PathLike | None = None,
    *,
    options: Given = (),
    device: str = "auto",
    batch_size: int = 256,
    samples: int = RESAMPLES,
    seed: int = 0,
    progress: bool = True,
) -> Guard:
    """Fit P(unsafe) of texts and images on a run's data, in the embeddings of the frozen model that it started from.

    Each modality gets a logistic regression, or a network with one hidden layer where that is better for certain. It is
    fitted to the run's training rows, and stopped, chosen and calibrated on its validation rows. Writes
    guard.safetensors and guard.json (docs/guard.md) into the run's folder, in place of those that are there.

    Args:
        run: the run's folder, or what `fine_tune` returned.
        data: quadruplets to report on, as `data.val` takes them; None: one half of the validation rows, and the other
            half alone stops, chooses and calibrates.
        options: how the quadruplets are read, `data.*` of training; the run's own are the defaults.
        device, batch_size: where and how embeddings are computed; the run's cached ones are taken as they are.
        samples, seed: resamples of the bootstrap; seed of the fit and of the bootstrap.
        progress: show bars.

    Returns:
        The Guard: `guard.text(embeddings)`, `guard.of_texts(["a dog"])`, `guard.figures`.

    Raises:
        FileNotFoundError: no such run.
        ConfigError: an option that is none, or a run that held nothing out.
        DataError, ValueError: data that cannot be read, or too few rows of a kind.
        FrozenModelError: the run's frozen model is not the one that it was tuned from.
        InUseError: another process writes to the run.
    """
    folder = Path(run)
    check_run(folder)
    config = read_config(str(folder), options)
    config.log.progress = progress
    if not (config.data.val or config.data.val_fraction):
        raise ConfigError(
            f"{folder} held no rows out to stop and calibrate on: name some with data.val=SOURCE, or "
            "data.val_fraction=0.1"
        )
    torch_config = load_config(None, {"device": device, "seed": seed}, "options")
    with claim(folder), settings_kept():
        place = set_up_torch(torch_config)
        check_writable(config.data.cache_dir, "data.cache_dir")
        clip = frozen_of(str(folder), place)
        guard = fit_parts(clip, _open_parts(config, data, clip, batch_size), samples, seed, progress)
        guard.save(folder / FILE)
        save_json(folder / FIGURES, guard.figures)
    return guard


def load_guard(
    source: str | os.PathLike, frozen: str | ClipModel | None = None, device: str | torch.device | None = None
) -> Guard:
    """The guard that `fit_guard` wrote, ready to use.

    Args:
        source: the run's folder, or a guard.safetensors, wherever it was copied to.
        frozen: the frozen model that it belongs to, in memory (`load_clip`), or as `evaluate` takes models; None: the
            one that the run started from.
        device: where both go; None: where a model in memory is, else the CPU.

    Raises:
        FileNotFoundError: no guard there.
        GuardError: a damaged file, or another frozen model: other weights, preprocessing, tokenizer or behavior.
        ValueError: a file, and no frozen model.
    """
    path = Path(source)
    file = path / FILE if path.is_dir() else path
    if not file.is_file():
        raise FileNotFoundError(f"no guard at {file}: fit one with saferclip guard RUN")
    if isinstance(frozen, ClipModel):
        return Guard.read(file, frozen if device is None else frozen.to(device))
    place = torch.device(device or "cpu")
    if frozen is None:
        if not is_run(str(path)):
            raise ValueError(f"{path} is no run, which would lead to the frozen model: name it, frozen=MODEL")
        return Guard.read(file, frozen_of(str(path), place))
    return Guard.read(file, open_model(frozen, place))


def fit_parts(clip: ClipModel, parts: Parts, samples: int = RESAMPLES, seed: int = 0, progress: bool = True) -> Guard:
    """The guard of a frozen model whose embeddings are known. Raises DataError for a part without a kind of item."""
    figures: dict[str, Any] = {}
    heads: dict[str, Head | None] = dict.fromkeys(MODALITIES)
    for modality in MODALITIES:
        items = [part.items(modality) for part in parts]
        if not items[0].unsafe.any():  # text-only data
            continue
        for part, found in zip(parts, items, strict=True):
            if not found.unsafe.any():
                raise DataError(f"{part.source} holds no unsafe {modality}: name other rows with --data or data.val")
        train, validation, test = items
        head, tried = fit_head(modality, train, validation, seed, progress)
        figures[modality] = {
            "hidden": head.hidden,
            "tried": {str(hidden): area for hidden, area in tried.items()},
            "calibration": dict(zip(("scale", "shift"), head.calibration.tolist(), strict=True)),
            **figures_of(head(test.embeddings), test.unsafe, samples, seed),
            "gate": at_gate(
                head(test.embeddings), test.unsafe, gate_threshold(head(validation.embeddings), validation.unsafe)
            ),
        }
        heads[modality] = head.to(clip.device)
    if not figures:
        raise DataError(f"{parts.train.source} holds nothing unsafe: there is nothing to learn from")
    about = {name: {"source": p.source, "rows": len(p.text_is_unsafe)} for name, p in parts._asdict().items()}
    described: dict[str, Any] = {
        "format": GUARD_FORMAT,
        "frozen": {"name": clip.name, "weights_hash": clip.weights_hash},
        "data": about,
        "settings": {"seed": seed, "resamples": samples, "confidence": CONFIDENCE},
        "modalities": figures,
    }
    return Guard(clip, heads["text"], heads["image"], described)


def embedded(
    clip: ClipModel, dataset: QuadrupletDataset, cache_dir: str | Path, precision: str = "fp32", **loading: Any
) -> Part:
    """All rows of `dataset`, embedded once and cached."""
    found = embed_quadruplets(clip, dataset, cache_dir, precision=precision, **loading).embeddings
    records = dataset.records
    labels = ([int(getattr(r, f"{name}_is_unsafe")) for r in records] for name in MODALITIES)
    return Part(dataset.summary.source, found, *map(torch.tensor, labels))


def _open_parts(config: Config, data: str | os.PathLike | None, clip: ClipModel, batch_size: int) -> Parts:
    """The run's training and validation rows, and those to report on. All are opened before any is embedded."""
    options = config.data
    sources = {"train": options.train, "val": options.val, "test": os.fspath(data) if data else ""}
    opened = {name: open_data(config, source, clip) for name, source in sources.items() if source}
    precision = config.train.precision
    parts = {
        name: embedded(
            clip,
            dataset,
            options.cache_dir,
            native_precision(clip.device) if precision == "auto" else precision,
            batch_size=batch_size,
            num_workers=options.num_workers,
            progress=config.log.progress,
        )
        for name, dataset in opened.items()
    }
    train = parts["train"]
    validation = parts.get("val")
    if validation is None:
        kept, held_out = split_rows(len(train.text_is_unsafe), options.val_fraction, config.seed)
        validation = train.rows(held_out, f"{train.source}, held-out {options.val_fraction:.3g}")
        train = train.rows(kept, train.source)
    test = parts.get("test")
    if test is None:
        chooses, reports = split_rows(len(validation.text_is_unsafe), 0.5, config.seed)
        test = validation.rows(reports, f"{validation.source}, one half")
        validation = validation.rows(chooses, f"{validation.source}, the other half")
    return Parts(train, validation, test)
