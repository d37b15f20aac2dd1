"""A patch from Python: what the command does, given values in place of words."""

from __future__ import annotations

import copy
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from ..config import Config, ConfigError, Given, flatten, load_config
from ..config import pairs as words_of
from ..data import DataError, QuadrupletDataset
from ..data.quadruplets import QuadrupletEmbeddings
from ..embeddings import embed_quadruplets
from ..evaluate.call import named_data
from ..models import ClipModel
from ..models.dial import mix
from ..models.lora import merged_state_dict
from ..sources import frozen_of, open_model
from ..storage.claim import claim
from ..storage.files import check_writable
from ..train.dataset import open_data
from ..train.device import set_up_torch, settings_kept
from ..train.run_folder import read_run_config
from .fit import Pairs, build_loss, fit, gradient_loss
from .folder import write
from .places import MAX_LOSS, Recipe, check_out, check_pairs, check_recipe, check_run
from .replay import Measured, embed_replay, losses, measured, open_replay
from .result import Patched
from .spectrum import spectra

STEPS = 4  # halvings of the interval that the kept part lies in: 1/16
_RECIPE = Recipe()
_NOT_TAKEN = ("data.train", "data.val", "data.val_fraction", "data.text_only", "objective.name", "objective.preset")


def patch_model(
    run: str | os.PathLike,
    pairs: Any,
    out: str | os.PathLike,
    *,
    replay: str | os.PathLike | None = None,
    steps: int = _RECIPE.steps,
    lr: float = _RECIPE.lr,
    rank: int = _RECIPE.rank,
    max_loss: float = MAX_LOSS,
    options: Given = (),
    device: str = "auto",
    batch_size: int = 256,
    seed: int = 0,
    progress: bool = True,
) -> Patched:
    """Experimental: teach a safe model a new kind of unsafe content from 1 to 32 pairs, in seconds: `sf.patch(...)`.

    The run's training goes on for some steps, with a change of low rank, over quadruplets that it was trained on and
    the new pairs together. Then the largest part of the change is kept with which what the model knew gets worse by at
    most `max_loss` (after Safety at One Shot, arXiv 2601.01887; the replay and the bound are ours).

    Args:
        run: the folder of the run that made the model safe.
        pairs: quadruplets of the new kind, as `fine_tune` takes them: a source, a data frame, dicts, a data set.
        out: a new or empty folder for the weights (open_clip's), patch.json, energy.png.
        replay: other quadruplets to go over in place of those that the run was trained on.
        steps, lr, rank: of the change.
        max_loss: by how much the unsafe rate at rank 10 of what is replayed may rise, and its safe retrieval may fall:
            less than what may be lost on other data, since this was trained on.
        options: `data.*`: how the pairs are read, `objective.*`: how they are redirected; the run's own are the
            defaults.
        device, batch_size: where and how embeddings are computed.
        seed: of the adapters and the batches; the same bits for the same seed, on the same machine.
        progress: show bars.

    Raises:
        ConfigError: no run, one without unsafe images, training data that is gone, or a change of which no part keeps
            `max_loss`.
        DataError: no pairs, or none of them has an unsafe side.
        ValueError: a number that means nothing. FloatingPointError: the loss is not finite.
        FileExistsError: `out` holds files. FileNotFoundError, FrozenModelError, InUseError: as `evaluate`.
    """
    start = time.perf_counter()
    check_recipe(steps, lr, rank, max_loss)
    path, folder = os.fspath(run), Path(out)
    check_run(path)
    check_out(folder)
    if isinstance(pairs, str | os.PathLike):
        check_pairs(os.fspath(pairs))
    own = read_run_config(path)
    if own.data.text_only:
        raise ConfigError(f"{path} was trained without unsafe images (data.text_only), and a patch needs them")
    given = _of_pairs(own, options)
    own.log.progress = given.log.progress = progress
    check_writable(own.data.cache_dir, "data.cache_dir")
    with claim(folder), named_data(given, pairs), settings_kept(), tempfile.TemporaryDirectory() as once:
        place = set_up_torch(load_config(None, {"device": device, "seed": seed}, "options"))
        clip, frozen = open_model(path, place).eval(), frozen_of(path, place).eval()
        new = _open_pairs(given, clip)
        loading: dict[str, Any] = {"batch_size": batch_size, "num_workers": own.data.num_workers, "progress": progress}
        source = None if replay is None else os.fspath(replay)
        old = embed_replay(frozen, open_replay(own, source, clip), own.data.cache_dir, loading)
        of_new = embed_quadruplets(frozen, new, own.data.cache_dir, title="embed pairs", **loading).embeddings
        shown = Pairs(new, QuadrupletEmbeddings(*(x.to(place) for x in of_new)))

        asked = build_loss(given, old, redirects_alone=True)
        found = tuple(spectra(clip, lambda: gradient_loss(clip, asked, old, shown)))
        recipe = Recipe(steps, lr, rank)
        adapted, changed = copy.deepcopy(clip), copy.deepcopy(clip)
        fit(adapted, build_loss(given, old), old, shown, recipe, seed, progress)
        changed.model.load_state_dict(merged_state_dict(adapted.model))
        unsafe = torch.tensor([(record.text_is_unsafe, record.image_is_unsafe) for record in new.records])

        def measure(model: ClipModel) -> Measured:
            both = (embed_quadruplets(model, data, once, title="measure", **loading) for data in (old.data, new))
            replayed, of_pairs = (rows.embeddings for rows in both)
            return measured(replayed, old.labels, of_pairs, unsafe)

        before = measure(clip)
        part, patched, after = _largest(lambda part: mix(clip, changed, part), measure, before, max_loss)
        figures = {"before": before.figures, "after": after.figures}
        result = Patched(patched, len(new), part, figures, found, time.perf_counter() - start, folder)
        write(result, asdict(recipe) | {"seed": seed, "max_loss": max_loss, "replayed_of": len(old.data)})
    return result


def _of_pairs(own: Config, options: Given) -> Config:
    """The run's options with those that are given; the pairs' images lie beside their table, unless one says otherwise.

    Raises ConfigError for options that a patch does not take.
    """
    words = dict(words_of(options))
    for word in words:
        if not word.startswith(("data.", "objective.")) or word in _NOT_TAKEN:
            raise ConfigError(
                f"{word} is not taken: data.* says how pairs are read, objective.* how they are redirected"
            )
    own_places = {"data.root": "", "data.unsafe_root": "", "data.text_only": False}
    return load_config(None, {**flatten(own), **own_places, **words})


def _open_pairs(config: Config, clip: ClipModel) -> QuadrupletDataset:
    """The pairs, all of which are rows that can be read. Raises DataError where none has an unsafe side."""
    opened = open_data(config, config.data.val, clip)
    if not any(record.text_is_unsafe or record.image_is_unsafe for record in opened.records):
        raise DataError(
            f"{config.data.val}: no pair has an unsafe side, all of them are labeled safe: a patch redirects what is "
            "unsafe, so give its texts and images the label 1, or none"
        )
    return opened


def _largest(
    at: Callable[[float], ClipModel], measure: Callable[[ClipModel], Measured], before: Measured, max_loss: float
) -> tuple[float, ClipModel, Measured]:
    """The largest part of the change, to 1/2^STEPS, with which no held figure is worse by more than `max_loss`.

    Raises ConfigError where there is none.
    """
    low, high, best = 0.0, 1.0, None
    part, worst = 1.0, {}
    for _ in range(STEPS + 1):
        model = at(part)
        after = measure(model)
        worst = losses(before, after, max_loss)
        if max(worst.values(), default=0.0) <= max_loss:
            low, best = part, (part, model, after)
        else:
            high = part
        if low == 1:
            break
        part = (low + high) / 2
    if best is None:
        name = max(worst, key=lambda name: worst[name])
        raise ConfigError(
            f"with {high:g} of the change {name} of what is replayed is worse by {worst[name]:.3f}, more than "
            f"--max-loss {max_loss:g}: allow more, take a smaller --lr or fewer --steps, or train on all data again"
        )
    return best
