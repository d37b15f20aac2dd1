"""The frozen model that a run is tuned from: opened, and refused where it is not what it was."""

from __future__ import annotations

import json
import re
import warnings
from pathlib import Path
from typing import NamedTuple

import torch

from ..config import Config
from ..errors import UserError
from ..models import CONFIG_NAME, WEIGHTS_NAME, ClipModel, load_clip
from ..models.identity import Identity, differences, identify
from ..models.loading import folder_of, starts_random
from ..storage.files import save_json
from .checkpoint import newest_state

RECORD = "frozen.json"  # in final/: what the run was tuned from
KEPT = "pretrained"  # in the run: models that were in memory (api)
FOLDER = "frozen"  # in the run: frozen weights that were drawn at random, which nothing else holds


class FrozenModelError(UserError, ValueError):
    """A run's frozen model is not the one that the run was tuned from, or cannot be read."""


class Frozen(NamedTuple):
    """A frozen model and what it is."""

    clip: ClipModel
    identity: Identity


def load_frozen(run_dir: Path, config: Config, device: str | torch.device = "cpu") -> ClipModel:
    """The pre-trained model that a finished run started from.

    Warns where the run does not say what that was.

    Raises:
        FrozenModelError: other weights, preprocessing, tokenizer or behavior than the run was tuned from, a damaged
            record, final/ of another run.
        FileNotFoundError: weights that have moved; says where to write the new place.
    """
    recorded = read_final(run_dir, config) or of_checkpoints(run_dir)
    if recorded is None and config.model.weights_hash:
        recorded = Identity(config.model.weights_hash)
    if recorded is None:
        warnings.warn(
            f"{run_dir} does not say which weights it was tuned from (no {RECORD}, no checkpoint): those that "
            f"{_origin(run_dir, config)} gives now are taken unchecked",
            stacklevel=2,
        )
    try:
        return _open(run_dir, config, recorded).clip.to(device)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{error}: the run started from it; where it has moved to goes into {run_dir / 'config.yaml'}, under "
            "model.pretrained"
        ) from error


def open_for_training(config: Config, device: torch.device) -> Frozen:
    """The model to tune: with resume=auto that of the run's checkpoints, and always that of model.weights_hash.

    Raises FrozenModelError where it is another.
    """
    run_dir, wanted = Path(config.run_dir), config.model.weights_hash
    if wanted and not re.fullmatch("[0-9a-f]{64}", wanted):
        raise FrozenModelError(
            f"model.weights_hash={wanted!r} is no SHA-256 (64 characters 0-9 and a-f): a run's config.yaml has its own"
        )
    found = _open(run_dir, config, of_checkpoints(run_dir) if config.resume == "auto" else None)
    given = found.identity.weights_hash
    if wanted and wanted != given:
        raise FrozenModelError(
            f"model.weights_hash asks for weights {_short(wanted)}, but {_origin(run_dir, config)} gives "
            f"{_short(given)}: give those weights, or leave model.weights_hash empty to train from these"
        )
    return Frozen(found.clip.to(device), found.identity)


def read_final(run_dir: Path, config: Config) -> Identity | None:
    """What final/ says that it was tuned from; None where the run is older than such records.

    Raises FrozenModelError for a damaged record, and for final/ of another run.
    """
    file, wanted = run_dir / "final" / RECORD, config.model.weights_hash
    if not file.is_file():
        if wanted and file.parent.is_dir():
            raise FrozenModelError(
                f"{file} is missing: this final/ is not what the run wrote; repeat the training's last command with "
                "resume=auto"
            )
        return None
    try:
        found = Identity.from_json(json.loads(file.read_text(encoding="utf-8")))
    except (ValueError, OSError, RecursionError) as error:
        raise FrozenModelError(
            f"{file} is damaged ({error}): repeat the training's last command with resume=auto"
        ) from error
    if wanted and found.weights_hash != wanted:
        raise FrozenModelError(
            f"{file.parent} is of another run: it was tuned from weights {_short(found.weights_hash)}, the run in "
            f"{run_dir} from {_short(wanted)} (model.weights_hash in config.yaml); put this run's own final/ back"
        )
    return found


def write_record(folder: Path, identity: Identity) -> None:
    """Writes into final/ what the run was tuned from."""
    save_json(folder / RECORD, identity.as_json())


def keep_random_weights(config: Config, clip: ClipModel) -> None:
    """Writes frozen weights that were drawn at random into the run, since nothing gives them again."""
    if starts_random(config.model.name, config.model.pretrained):
        clip.export(Path(config.run_dir) / FOLDER)


def of_checkpoints(run_dir: Path) -> Identity | None:
    """What the newest readable checkpoint says that the run is tuned from; None where there is none.

    Checkpoints from before there were such records hold the hash of the weights alone.
    """
    state = newest_state(run_dir / "checkpoints") or {}
    try:
        return Identity.from_json(state["frozen"]) if "frozen" in state else Identity(state["weights_hash"])
    except (KeyError, TypeError, ValueError):
        return None


def _open(run_dir: Path, config: Config, recorded: Identity | None) -> Frozen:
    """The frozen model on the CPU, whose rounding is the same for every run, compared with what was `recorded`."""
    clip = _load(run_dir, config, recorded)
    found = identify(clip)
    if recorded is not None and (differ := differences(recorded, found)):
        raise FrozenModelError(
            f"{run_dir} was tuned from weights {_short(recorded.weights_hash)}, and {_origin(run_dir, config)} gives "
            f"{_short(found.weights_hash)}; what differs: {', '.join(differ)}; "
            f"{_remedy(run_dir, config, recorded, found)}, or train again in another run_dir"
        )
    return Frozen(clip, found)


def _load(run_dir: Path, config: Config, recorded: Identity | None) -> ClipModel:
    options = config.model
    if not starts_random(options.name, options.pretrained):
        return load_clip(_where_kept(run_dir, options.name), options.pretrained)
    if recorded is None or not (recorded.behavior or (run_dir / FOLDER).is_dir()):
        return _draw(config)  # a new run, or one from before the weights were kept
    return _load_kept(run_dir, config)


def _where_kept(run_dir: Path, name: str) -> str:
    """`name`, or the run's own copy of a model that was in memory, which moves with the run."""
    kept = run_dir / KEPT / Path(name).name
    return f"local-dir:{kept}" if name.startswith("local-dir:") and (kept / WEIGHTS_NAME).is_file() else name


def _load_kept(run_dir: Path, config: Config) -> ClipModel:
    folder = run_dir / FOLDER
    try:
        for name in (CONFIG_NAME, WEIGHTS_NAME):
            if not (folder / name).is_file():
                raise FileNotFoundError(f"no {name}")
        clip = load_clip(f"local-dir:{folder}")
    except (OSError, ValueError) as error:
        raise FrozenModelError(
            f"{folder} holds the random weights that the run was tuned from, and is damaged or missing ({error}): put "
            "it back from a copy, or train again in another run_dir"
        ) from error
    clip.name = Path(config.model.name).stem if config.model.name.endswith(".json") else config.model.name
    return clip


def _draw(config: Config) -> ClipModel:
    """Random weights, the same for one seed whatever was drawn before and without a trace in torch's generator."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        return load_clip(config.model.name)


def _origin(run_dir: Path, config: Config) -> str:
    options = config.model
    if starts_random(options.name, options.pretrained) and (run_dir / FOLDER).is_dir():
        return str(run_dir / FOLDER)
    return (
        options.name if folder_of(options.name) or not options.pretrained else f"{options.name}, {options.pretrained}"
    )


def _remedy(run_dir: Path, config: Config, then: Identity, now: Identity) -> str:
    if then.weights_hash == now.weights_hash:
        remedy = "use the model and the packages that the run was trained with"
    elif starts_random(config.model.name, config.model.pretrained):
        remedy = f"put {run_dir / FOLDER} back from a copy"
    else:
        remedy = "let model.pretrained (config.yaml, or the training's words) lead to the old weights"
    if then.open_clip and then.open_clip != now.open_clip:
        remedy += f" (open_clip was {then.open_clip} and is {now.open_clip})"
    return remedy


def _short(weights_hash: str) -> str:
    return weights_hash[:12]
