"""Training checkpoints: one safetensors file each, tensors plus a JSON state, whole or absent."""

from __future__ import annotations

import hashlib
import json
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..config import Config, flatten
from ..errors import UserError
from ..storage.files import remove_leftovers, save_tensors
from .fsdp import sliced_like

FORMAT = "saferclip_fast.checkpoint.v2"
_NAME = re.compile(r"step-\d{10}\.safetensors")

# Options that a resumed run may change without changing its result.
FREE_TO_CHANGE = (
    "run_dir",
    "resume",
    "model.weights_hash",  # names the weights that are loaded, and these are compared
    "data.num_workers",
    "data.cache_dir",
    "data.decoded_cache",
    "validation.final",  # which of the weights are exported
    "train.checkpointing",
    "train.profile",
    "train.timeout_minutes",
    "checkpoint.",
    "log.",
)
# Where weights and data lie may change too: what they are is compared, by hashes.
PLACES = ("model.pretrained", "data.train", "data.val", "data.root", "data.unsafe_root")
# Options that it may change at the price of other rounding.
ROUNDING_ONLY = ("device", "threads", "objective.backend", "objective.bank", "train.compile", "train.fsdp")


class CheckpointError(UserError, RuntimeError):
    """No checkpoint can be read, or one belongs to another run."""


class Checkpoint(NamedTuple):
    """The content of a checkpoint file: tensors by name, and the rest as JSON."""

    path: Path
    tensors: dict[str, Tensor]
    state: dict[str, Any]


class CheckpointFolder:
    """The newest `keep` checkpoints of a run, named by step."""

    def __init__(self, folder: str | Path, keep: int) -> None:
        self.folder = Path(folder)
        self.keep = keep

    def paths(self) -> list[Path]:
        """All checkpoint files, oldest step first."""
        found = [path for path in self.folder.glob("step-*.safetensors") if _NAME.fullmatch(path.name)]
        return sorted(found)  # numbers have ten digits

    def path(self, step: int) -> Path:
        return self.folder / f"step-{step:010d}.safetensors"

    def save(self, step: int, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> Path:
        """Write a checkpoint, then delete all but the newest `keep`.

        Raises OSError, naming the file, the reason and the last good checkpoint, if it cannot be written.
        """
        path = self.path(step)
        before = self.paths()
        try:
            save_checked(path, tensors, state)
        except OSError as error:
            good = f"goes on from {before[-1]}" if before else "starts anew"
            raise OSError(error.errno, f"{error.strerror}; make room, then resume=auto {good}") from error
        for old in self.paths()[: -self.keep]:
            old.unlink()
        return path

    def load_newest(self) -> Checkpoint | None:
        """The newest checkpoint that can be read, or None if there is none at all.

        A damaged one is set aside as FILE.damaged, with a warning that names it and the one used instead.

        Raises CheckpointError if there are checkpoints but all are damaged.
        """
        remove_leftovers(self.folder)
        damaged = []
        for path in reversed(self.paths()):
            try:
                checkpoint = read_checkpoint(path)
            except CheckpointError as error:
                damaged.append(path.rename(path.with_name(path.name + ".damaged")))
                warnings.warn(f"{error}; set aside as {damaged[-1].name}", stacklevel=2)
                continue
            if damaged:
                warnings.warn(f"going on from {path} instead of {damaged[0].name}", stacklevel=2)
            return checkpoint
        if damaged:
            raise CheckpointError(
                f"every checkpoint in {self.folder} is damaged ({', '.join(p.name for p in damaged)}); "
                "restore one of them, or delete the folder to start anew"
            )
        return None


def read_checkpoint(path: str | Path) -> Checkpoint:
    """Read one checkpoint file. Raises CheckpointError where it is damaged, naming the file and the reason."""
    return load_checked(Path(path))


def newest_state(folder: Path) -> dict[str, Any] | None:
    """The JSON state of the newest checkpoint in `folder` whose header can be read; its tensors are not looked at."""
    for path in reversed(CheckpointFolder(folder, keep=1).paths()):
        try:
            with safe_open(path, framework="pt", device="cpu") as file:
                state = json.loads((file.metadata() or {})["state"])
        except (SafetensorError, OSError, KeyError, ValueError, RecursionError):
            continue  # going on from the checkpoints says what is wrong with it
        if isinstance(state, dict):
            return state
    return None


def save_checked(path: Path, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
    """Write tensors and a JSON state with a checksum of all of it, atomically."""
    text = json.dumps(state)
    on_cpu = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    save_tensors(path, on_cpu, {"format": FORMAT, "state": text, "checksum": _checksum(on_cpu, text)})


def load_checked(path: Path) -> Checkpoint:
    """Inverse of save_checked. Raises CheckpointError where a bit is not as it was written."""
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            metadata = file.metadata() or {}
            # clones: the file may be replaced while its tensors are in use
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 - not a dict
    except (SafetensorError, OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"checkpoint {path} is damaged: {error}") from error
    if metadata.get("format") != FORMAT:
        raise CheckpointError(f"{path} is no checkpoint of this version (format {metadata.get('format')})")
    text = metadata.get("state", "")
    if metadata.get("checksum") != _checksum(tensors, text):
        raise CheckpointError(f"checkpoint {path} is damaged: its checksum is not that of its content")
    try:
        return Checkpoint(path, tensors, json.loads(text))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"checkpoint {path} is damaged: its state is not JSON ({error})") from error


def _checksum(tensors: Mapping[str, Tensor], text: str) -> str:
    """SHA-256 of names, types, shapes and bytes of all tensors, and of `text`."""
    digest = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def pack_optimizer(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's state as flat tensors "optimizer.<parameter number>.<name>"; its settings are the config's."""
    return {
        f"optimizer.{number}.{name}": value
        for number, state in optimizer.state_dict()["state"].items()
        for name, value in state.items()
    }


def unpack_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Inverse of pack_optimizer, into an optimizer over the same parameters."""
    state: dict[int, dict[str, Tensor]] = {}
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for key, value in tensors.items():
        prefix, *rest = key.split(".", 2)
        if prefix == "optimizer":
            parameter = parameters[int(rest[0])]
            value = sliced_like(parameter, value) if value.ndim else value  # step counts are on every rank
            state.setdefault(int(rest[0]), {})[rest[1]] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def check_same_run(path: Path, state: Mapping[str, Any], now: Mapping[str, Any], hashes: Mapping[str, str]) -> None:
    """Raises CheckpointError unless a checkpoint's state has these options `now` and these `hashes`."""
    then = flatten(Config()) | state["config"]  # an option younger than the checkpoint had its default's effect
    changed = [k for k in now if now[k] != then[k] and not k.startswith(FREE_TO_CHANGE)]
    rounding = [k for k in changed if k in ROUNDING_ONLY]
    if rounding:
        warnings.warn(f"{', '.join(rounding)} changed since {path}: not bit for bit the same run", stacklevel=2)
    other = {k: v for k, v in hashes.items() if v != state.get(k, v)}  # a hash may be younger than the checkpoint
    reported = [k for k in changed if k not in ROUNDING_ONLY and (other or k not in PLACES)]
    differences = [f"{k}={now[k]} (was {then[k]})" for k in reported]
    differences += [f"{k}={v[:12]} (was {state[k][:12]})" for k, v in other.items()]
    if differences:
        raise CheckpointError(
            f"{path} is from another run: {', '.join(differences)}; use the old values, or another run_dir"
        )
