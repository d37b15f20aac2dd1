"""The network, asked only where it answers: weights, configs and tokenizers of Hugging Face's hub."""

from __future__ import annotations

import contextlib
import os
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

import open_clip
from huggingface_hub import constants

PATIENCE = 3.0  # seconds for a connection


def needs_hub(name: str, pretrained: str) -> bool:
    """Whether open_clip asks the hub for a model: for its tag, by its name, or for a text encoder that lies there."""
    if name.startswith("hf-hub:"):
        return True
    text = _text_config(name)
    places = [text[key] for key in ("hf_model_name", "hf_tokenizer_name") if text.get(key)]
    if name.startswith("local-dir:"):
        places = places if "hf_model_name" in text else []  # the tokenizer lies in the folder
    of_tag = open_clip.get_pretrained_cfg(name, pretrained) if pretrained else {}
    return bool(of_tag.get("hf_hub")) or any(not Path(place).is_dir() for place in places)


def _text_config(name: str) -> dict[str, Any]:
    """The architecture's text_cfg; nothing where a folder's config is damaged, which loading it says better."""
    try:
        found = open_clip.get_model_config(name)
    except (OSError, ValueError):
        return {}
    text = found.get("text_cfg") if isinstance(found, dict) else None
    return text if isinstance(text, dict) else {}


@contextlib.contextmanager
def asking_hub(what: str) -> Iterator[None]:
    """Inside, the hub is asked if it answers within PATIENCE seconds, else its files on this machine alone; says so.

    huggingface_hub tries each file six times, for up to a minute, without a word.

    Raises OSError, naming `what` and the remedy, for what is not on this machine and cannot be asked for.
    """
    offline, reason = constants.is_offline_mode(), "HF_HUB_OFFLINE is set"
    if not offline:
        print(f"{what}: asking {constants.ENDPOINT}", file=sys.stderr, flush=True)
        offline, reason = not _answers(constants.ENDPOINT), f"{constants.ENDPOINT} does not answer"
    before, constants.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE, offline
    try:
        yield
    except Exception as error:  # of open_clip, transformers, the hub: anything may come out
        if not offline:
            raise
        lines = str(error).splitlines() or [""]
        raise OSError(
            f"{what}: not on this machine, and {reason}; pass a weights file or local-dir:FOLDER "
            f"({type(error).__name__}: {lines[0]:.120})"
        ) from error
    finally:
        constants.HF_HUB_OFFLINE = before


def _answers(url: str) -> bool:
    """Whether a connection to the host of `url` opens. Behind a proxy nothing can be told, so yes."""
    place = urlsplit(url)
    if place.scheme in getproxies() or os.environ.get("ALL_PROXY"):
        return True
    address = (place.hostname, place.port or (443 if place.scheme == "https" else 80))
    try:
        socket.create_connection(address, PATIENCE).close()
    except OSError:
        return False
    return True
