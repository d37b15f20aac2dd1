"""Options as a file and a command line give them, checked when they are read.

They come from the defaults, the recipe that a choice brings, a YAML file and `key=value` words, in this order.
"""

import copy
import difflib
import functools
import math
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ..recipes import RECIPES
from .options import TRACKERS, Config, ConfigError, options

Given = Sequence[str] | Mapping[str, Any]  # options: "key=value" words, or values by their keys, dotted or nested
CONFIG_FOLDER = Path(__file__).parents[1] / "configs"


def load_config(path: str | Path | None = None, overrides: Given = (), source: str = "command line") -> Config:
    """Defaults, then what objective.preset and objective.name bring (RECIPES), the YAML file, the `overrides`.

    Args:
        path: a YAML file, or the name of a shipped one ("paper"); None for the defaults alone.
        overrides: words such as "optimizer.lr=3e-4" or "lora.targets=[in_proj,out_proj]", or values by their keys;
            `source` says in messages where they are from.

    Raises:
        ConfigError: unknown key (with the nearest one), wrong type, value out of range, unreadable file.
    """
    layers = []
    if path is not None:
        file, values = _read_yaml(path)
        layers.append((OmegaConf.create(values), [k for k, _ in _leaves(values)], file))
    kinds = {o.key: o.kind for o in options()}
    words, keys = OmegaConf.create(), list[str]()
    for key, value in pairs(overrides):
        _check_key(key, kinds, source)
        # text as typed: empty words stay, and nothing that YAML would read as something else changes
        typed = kinds[key] == "str" or not isinstance(value, str)
        OmegaConf.update(words, key, value if typed else OmegaConf.from_dotlist([f"x={value}"]).x)
        keys.append(key)
    layers.append((words, keys, source))
    given = _defaults()
    for layer in layers:
        given = _merge(given, *layer)
    merged = copy.deepcopy(_defaults())
    for (key, chosen), brought in RECIPES.items():
        if OmegaConf.select(given, key) == chosen:
            for other, value in brought.items():
                OmegaConf.update(merged, other, value)
    for layer in layers:
        merged = _merge(merged, *layer)
    config: Config = OmegaConf.to_object(merged)  # type: ignore[assignment]
    _check_ranges(config)
    return config


@functools.cache  # half of the time of load_config; never changed, only copied
def _defaults() -> Any:
    return OmegaConf.structured(Config)


def pairs(given: Given) -> Iterator[tuple[str, Any]]:
    """(key, value) of each option, in order. Raises ConfigError for a word without "=" and a value of another kind."""
    if isinstance(given, Mapping):
        for key, value in _leaves(given):
            if isinstance(value, os.PathLike | tuple):
                value = os.fspath(value) if isinstance(value, os.PathLike) else list(value)
            if not isinstance(value, str | int | float | list):
                raise ConfigError(f"{key}={value!r:.60}: an option is text, a number, true or false, or a list")
            yield key, value
        return
    for word in given:
        key, equals, value = word.partition("=")
        if not equals:
            raise ConfigError(f"{word!r} is not key=value{_nearest(key)}")
        yield key, value


def flatten(config: Config) -> dict[str, Any]:
    """The config as {"group.name": value}."""
    return dict(_leaves(asdict(config)))


def _read_yaml(path: str | Path) -> tuple[str, dict[str, Any]]:
    file = Path(path)
    if not file.is_file() and file.suffix == "" and (CONFIG_FOLDER / f"{path}.yaml").is_file():
        file = CONFIG_FOLDER / f"{path}.yaml"
    if not file.is_file():
        shipped = ", ".join(sorted(f.stem for f in CONFIG_FOLDER.glob("*.yaml")))
        raise ConfigError(f"config file {path} not found; shipped configs: {shipped}")
    try:
        # OmegaConf's loader reads 1e-4 as a number, plain YAML as text
        values = OmegaConf.to_container(OmegaConf.load(file))
    except (yaml.YAMLError, OmegaConfBaseException, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: not valid YAML: {error}") from error
    except OSError as error:  # also OmegaConf's for a file that is one number
        raise ConfigError(f"{file}: cannot be read, or holds no `key: value` lines: {error}") from error
    if not values:
        raise ConfigError(f"{file}: is empty, no `key: value` line in it")
    if not isinstance(values, dict):
        raise ConfigError(f"{file}: expected `key: value` lines, found a {type(values).__name__}")
    return str(file), {str(key): value for key, value in values.items()}


def _merge(merged: Any, values: Any, keys: Sequence[str], source: str) -> Any:
    kinds = {o.key: o.kind for o in options()}
    for key in keys:
        _check_key(key, kinds, source)
    try:
        return OmegaConf.merge(merged, values)
    except OmegaConfBaseException as error:
        key = error.full_key or ""
        reason = str(error).splitlines()[0]
        raise ConfigError(f"{source}: {key} takes {_article(kinds.get(key, 'value'))}: {reason}") from error


def _check_key(key: str, known: Collection[str], source: str) -> None:
    if key not in known:
        raise ConfigError(f"{source}: unknown option {key!r}{_nearest(key)}")


def _check_ranges(config: Config) -> None:
    values = flatten(config)
    for o in options():
        value, low, high = values[o.key], o.low, o.high
        if isinstance(value, float) and not math.isfinite(value):
            raise ConfigError(f"{o.key}={value}: must be a finite number")
        if (low is not None and value < low) or (high is not None and value > high):
            bounds = f"at least {low}" if high is None else f"from {low} to {high}"
            raise ConfigError(f"{o.key}={value}: must be {bounds} ({o.meaning})")
    for name in config.log.to:
        if name not in TRACKERS:
            near = difflib.get_close_matches(name, TRACKERS, 1)
            hint = f"did you mean {near[0]!r}?" if near else f"choose from {', '.join(TRACKERS)}"
            raise ConfigError(f"log.to: no place is called {name!r}, {hint}")


def _leaves(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _nearest(key: str) -> str:
    known = [o.key for o in options()]
    near = difflib.get_close_matches(key, known, 1, cutoff=0.5)
    if not near:  # the right name in the wrong group
        near = [k for k in known if k.rsplit(".", 1)[-1] == key.rsplit(".", 1)[-1]][:1]
    return f", did you mean {near[0]!r}?" if near else "; --help lists all options"


def _article(kind: str) -> str:
    names = {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "text", "list": "a list"}
    return names.get(kind, "one of " + kind)
