"""What can be known of a run's data and model by their names alone: checked before torch is imported."""

from __future__ import annotations

import importlib.util

from ..config import Config, ConfigError
from ..data.places import check_place as check_data
from ..models.places import check_place as check_model


def check_places(config: Config) -> None:
    """Whether data and model are named, and there.

    Raises:
        ConfigError: no training data named, or a place of log.to that is not installed.
        data.DataError, ValueError: a source that is not there, or of no known format.
        FileNotFoundError: an architecture, folder or weights file that is not there.
    """
    options = config.data
    if not options.train:
        raise ConfigError("data.train is empty: name the training quadruplets, e.g. data.train=visu.json")
    check_installed(config)
    for source in filter(None, (options.train, options.val)):
        check_data(source, options.root or None)
    if config.resume == "never":  # a run has a copy of a model that was in memory, wherever it has moved
        check_model(config.model.name, config.model.pretrained)


def check_installed(config: Config) -> None:
    """Raises ConfigError for a place whose package is not installed."""
    for name in config.log.to:
        if importlib.util.find_spec(name) is None:
            raise ConfigError(f"log.to={config.log.to}: {name} is not installed: pip install {name}, or leave it out")
