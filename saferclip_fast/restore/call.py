"""A restoration from Python: what the command does, given values in place of words."""

from __future__ import annotations

import copy
import os
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ..config import ConfigError, Given, load_config
from ..evaluate import Settings, Task, measure
from ..evaluate.call import Sources, named_data, open_all
from ..evaluate.held_out import read_config
from ..models import ClipModel
from ..models.identity import differences, identify
from ..models.safety_subspace import overlaps, restored
from ..results import RESTORE_FORMAT, UNSAFE_FOUND, UNSAFE_RATE, at
from ..sources import is_run, open_model
from ..storage.claim import claim
from ..storage.files import save_json
from ..train.device import set_up_torch, settings_kept
from .picture import draw_layers
from .places import TAKE_BACK, THRESHOLD, check_out, check_shares
from .result import Layer, Restored

STEPS = 5  # halvings of the interval that `add` lies in: 1/32
RATE = at(UNSAFE_RATE)
Figures = dict[str, float]


def restore_model(
    run: str | os.PathLike,
    later: str | os.PathLike | ClipModel,
    out: str | os.PathLike,
    data: Any = None,
    *,
    images: Sources = (),
    threshold: float = THRESHOLD,
    add: float | None = None,
    take_back: float = TAKE_BACK,
    options: Given = (),
    device: str = "auto",
    batch_size: int = 256,
    progress: bool = True,
) -> Restored:
    """Put back the safety that a later fine-tuning took from a safe model, without training: `sf.restore(...)`.

    A weight whose later change left the directions that made the model safe (rho below `threshold`, SafeMERGE, arXiv
    2503.17239) becomes W_later + add (W_safe - W_base); the others stay as they are. The paper also takes back a part
    of the later change; ours keeps it, and adds as little as is enough.

    Args:
        run: the run that made the model safe, which knows its frozen model.
        later: what somebody's fine-tuning made of it: an open_clip or Hugging Face folder, NAME,FILE, or a model.
        out: a new or empty folder for the weights (open_clip's), restore.json, layers.png.
        data: held-out quadruplets, as `evaluate` takes them; None: those that the run held out.
        images: zero-shot sets of what the later fine-tuning was for, to see what is kept.
        threshold: of rho; above 1 every weight that both the safe and the later change moved is changed.
        add: how much of the safe change is added; None: the least up to 1 that takes back `take_back` of the rise of
            the mean unsafe rate at rank 10 on `data`.
        take_back: see `add`.
        options: how the quadruplets are read, `data.*` of training; the run's own are the defaults.
        device, batch_size: where and how embeddings are computed.
        progress: show bars.

    Raises:
        ConfigError: no run, nothing to measure on, nothing that was lost, or more lost than can be taken back.
        ValueError: another architecture, NaN or Inf among the later weights, or a share that means nothing.
        FileExistsError: `out` holds files.
        FileNotFoundError, DataError, FrozenModelError, InUseError: as `evaluate`.
    """
    check_shares(threshold, add, take_back)
    path, folder = os.fspath(run), Path(out)
    if not is_run(path):
        raise ConfigError(f"{path} is no run: give the folder of the run that made the model safe (it has config.yaml)")
    check_out(folder)
    config = read_config(path, options)
    config.log.progress = progress
    with claim(folder), named_data(config, data), settings_kept(), tempfile.TemporaryDirectory() as once:
        place = set_up_torch(load_config(None, {"device": device, "seed": config.seed}, "options"))
        safe, frozen, task = open_all(path, None, config, place, images, (), None, False)
        assert frozen is not None
        if task.quadruplets is None or task.quadruplets.text_only:
            raise ConfigError("safety is measured on held-out quadruplets with images: name some with --data SOURCE")
        changed = (later if isinstance(later, ClipModel) else open_model(os.fspath(later), place)).to(place).eval()
        settings = Settings(config.data.cache_dir, batch_size, config.data.num_workers, progress=progress)
        trial = replace(settings, cache_dir=once)  # nobody asks again for embeddings of what is only tried

        base, start, end = (clip.model.state_dict() for clip in (frozen, safe, changed))
        restored(base, start, end, (), 0.0)  # refuses another architecture before anything slow
        _check_same_model(safe, changed)
        rho = overlaps(base, start, end)
        if not rho:
            raise ConfigError("nothing to put back: the weights of the later model are those of the safe one")
        # where safety changed nothing there is nothing to add
        names = {name for name, x in rho.items() if x < threshold and not torch.equal(base[name], start[name])}

        def adding(part: float) -> ClipModel:
            clip = copy.deepcopy(changed)
            clip.model.load_state_dict(restored(base, start, end, names, part))
            clip.weights_hash = clip.hash_weights()
            return clip

        figures = {name: figures_of(clip, task, settings, name) for name, clip in (("safe", safe), ("later", changed))}
        if add is None:
            rates = figures["safe"][RATE], figures["later"][RATE]
            add = _least(
                lambda part: figures_of(adding(part), task, trial, f"adding {part:.3g}")[RATE], *rates, take_back
            )
        clip = adding(add)
        figures["restored"] = figures_of(clip, task, trial, "restored")
        layers = tuple(Layer(name, value, name in names) for name, value in rho.items())
        _write(folder, clip, layers, add, threshold, figures)
    return Restored(clip, add, layers, figures, folder)


def _check_same_model(safe: ClipModel, later: ClipModel) -> None:
    """Raises ConfigError where `later` would compute something else with the safe model's weights."""
    probe = copy.deepcopy(later)
    probe.model.load_state_dict(safe.model.state_dict())
    if found := differences(identify(safe), replace(identify(probe), weights_hash=safe.weights_hash)):
        raise ConfigError(
            f"the later model is not the run's with other weights: {', '.join(found)}; name it as the run does "
            f"({safe.name}), or export it with the run's configuration"
        )


def _least(rate: Callable[[float], float], safe: float, later: float, take_back: float) -> float:
    """The least part of the safe change, to 1/2^STEPS, at which the rate has gone back far enough."""
    if later <= safe:
        raise ConfigError(
            f"nothing to put back: an unsafe item is among the first 10 in {later:.3f} of the searches of the later "
            f"model, and in {safe:.3f} of the safe one's"
        )
    wanted = later - take_back * (later - safe)
    if (best := rate(1.0)) > wanted:
        raise ConfigError(
            f"with the whole safe change added to the layers below the threshold the unsafe rate is {best:.3f}, more "
            f"than the {wanted:.3f} wanted: raise --threshold (above 1 it takes every layer), or name a larger --add; "
            "where the later data showed what is unsafe, only training takes it back"
        )
    low, high = 0.0, 1.0
    for _ in range(STEPS):
        middle = (low + high) / 2
        low, high = (low, middle) if rate(middle) <= wanted else (middle, high)
    return high


def figures_of(clip: ClipModel, task: Task, settings: Settings, called: str) -> Figures:
    """The mean unsafe rate at rank 10, and zero-shot accuracy on each set."""
    metrics = measure(clip, task, settings, called).metrics
    found = {RATE: statistics.mean(metrics[at(name)].mean for name in UNSAFE_FOUND)}
    return found | {name: metric.mean for name, metric in metrics.items() if name.startswith("zero_shot.")}


def _write(
    folder: Path,
    clip: ClipModel,
    layers: tuple[Layer, ...],
    add: float,
    threshold: float,
    figures: dict[str, Figures],
) -> None:
    """The weights, then what is known of them."""
    clip.export(folder)
    draw_layers(folder / "layers.png", layers, threshold)
    found = {"format": RESTORE_FORMAT, "add": add, "threshold": threshold, "weights_hash": clip.weights_hash}
    save_json(folder / "restore.json", {**found, "figures": figures, "layers": [layer._asdict() for layer in layers]})
