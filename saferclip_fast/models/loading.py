"""Loading a model by name, file or folder, with a message for everything that can be wrong with it."""

from __future__ import annotations

import copy
import difflib
import json
import tempfile
import warnings
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.tokenizer import SimpleTokenizer

from .clip import CONFIG_NAME, ClipModel
from .hub import asking_hub, needs_hub
from .places import check_place

_SIMPLE: dict[str, SimpleTokenizer] = {}  # by the text settings, all that they depend on; reading one takes 0.15 s
WEIGHTS = (".safetensors", ".bin", ".pth")  # by which open_clip knows weights in a folder


def load_clip(name: str, pretrained: str = "", device: str | torch.device = "cpu") -> ClipModel:
    """Load an open_clip model, frozen, with its preprocessing and tokenizer.

    Args:
        name: a model that open_clip or this package knows ("ViT-L-14-quickgelu", "ViT-small-8-64"), an
            architecture as JSON ("my-clip.json"), "hf-hub:ORG/MODEL", or a folder ("local-dir:FOLDER" or its path)
            that open_clip wrote or that holds a Hugging Face CLIPModel.
        pretrained: a tag ("openai", "laion2b_s32b_b82k") or a weights file; without meaning for folders and hf-hub:.
            Empty otherwise means random weights, with a warning.
        device: where the model goes.

    Raises:
        ValueError: unknown name or tag (with the nearest known one), weights that do not fit the model or are
            damaged, a config that open_clip cannot build, a Hugging Face model that it cannot express.
        FileNotFoundError: a JSON, weights file or folder that is not there.
        OSError: the weights of a tag, or the tokenizer, could not be downloaded.
    """
    check_place(name, pretrained)
    folder = folder_of(name)
    if folder is not None:
        if Path(pretrained).is_file():
            raise ValueError(f"{name} is a folder with weights of its own, {pretrained} cannot be its too: give one")
        return _load_folder(folder, name, device)
    if not name.startswith("hf-hub:"):
        name = _register(name) if name.endswith(".json") else name
        _check_name(name)
        _check_pretrained(name, pretrained)
        if starts_random(name, pretrained):
            warnings.warn(f"{name} starts from random weights: give a pretrained tag or file", stacklevel=2)
    return _load(name, pretrained, device)


def folder_of(name: str) -> Path | None:
    """The folder that `name` stands for, or None for any other name."""
    if name.startswith("local-dir:"):
        return Path(name.removeprefix("local-dir:"))
    is_name = name.startswith("hf-hub:") or name.replace("/", "-") in open_clip.list_models()
    return Path(name) if not is_name and Path(name).is_dir() else None


def _load_folder(folder: Path, name: str, device: str | torch.device) -> ClipModel:
    """The model in `folder`, called `name`. Raises ValueError where there is none, with the remedy."""
    from .huggingface import hf_to_open_clip, is_hf_folder  # it imports this module's package

    if is_hf_folder(folder):
        with tempfile.TemporaryDirectory() as converted:
            hf_to_open_clip(folder, Path(converted))
            clip = _load(f"local-dir:{converted}", "", device)
        clip.name = name
        return clip
    if not (folder / CONFIG_NAME).is_file():
        final = folder / "final"
        hint = f"; it is a run, whose tuned model is {final}" if (final / CONFIG_NAME).is_file() else ""
        raise FileNotFoundError(
            f"{folder} is no open_clip folder (no {CONFIG_NAME}) and no Hugging Face folder (no config.json){hint}"
        )
    if not any(file.suffix in WEIGHTS for file in folder.iterdir()):
        raise FileNotFoundError(f"{folder} holds no weights ({', '.join(WEIGHTS)}), only a config: put them there")
    clip = _load(f"local-dir:{folder}", "", device)
    clip.name = name
    return clip


def _load(name: str, pretrained: str, device: str | torch.device) -> ClipModel:
    what = f"{name} {pretrained}".rstrip()
    with asking_hub(what) if needs_hub(name, pretrained) else nullcontext():
        has_files = name.startswith(("local-dir:", "hf-hub:"))
        tokenizer = None if has_files else _tokenizer(name)  # before the weights, which take longer to come
        model, preprocess = _create(name, pretrained, device)
        if starts_random(name, pretrained):
            _draw_the_rest(model)
        config = {
            "model_cfg": open_clip.get_model_config(name),
            "preprocess_cfg": open_clip.get_model_preprocess_cfg(model),
        }
        return ClipModel(model, name, preprocess, tokenizer or _tokenizer(name), config).to(device)


def _create(name: str, pretrained: str, device: str | torch.device) -> tuple[Any, Any]:
    """open_clip's model and preprocessing, with a message for what it says of weights and configs."""
    try:
        model, _, preprocess = open_clip.create_model_and_transforms(name, pretrained=pretrained or None, device=device)
        return model, preprocess
    except (OSError, ValueError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # open_clip reads weights and configs unchecked: anything may come out
        lines = [line.strip() for line in str(error).splitlines()]
        misfits = [line for line in lines if "size mismatch" in line or "key" in line or "pos_embed" in line]
        if misfits:
            raise ValueError(f"weights {pretrained or name} do not fit model {name}: {misfits[0][:300]}") from error
        if "download" in str(error):
            raise OSError(
                f"could not download {pretrained} for {name} ({error}); where there is no network, "
                "pass a weights file or local-dir:FOLDER"
            ) from error
        raise ValueError(
            f"open_clip cannot load {name} {pretrained}: are config and weights whole? "
            f"({type(error).__name__}: {error!s:.300})"
        ) from error


def _draw_the_rest(model: Any) -> None:
    """Draws what open_clip (3.3) leaves as memory has it, so that one seed gives one model: of CoCa's decoder."""
    projection = getattr(getattr(model, "text_decoder", None), "text_projection", None)
    if projection is not None:
        torch.nn.init.normal_(projection, std=projection.shape[0] ** -0.5)  # as its init_parameters would


def _tokenizer(name: str) -> Any:
    """open_clip's tokenizer of the model. Raises OSError, naming the model and the remedy, where it cannot be had."""
    try:
        if name.startswith("hf-hub:"):
            return open_clip.get_tokenizer(name)
        text = (open_clip.get_model_config(name) or {}).get("text_cfg")
        settings = json.dumps([text, "" if name.startswith("local-dir:") else name])
        if settings not in _SIMPLE:
            tokenizer = open_clip.get_tokenizer(name)
            if not isinstance(tokenizer, SimpleTokenizer):
                return tokenizer
            _SIMPLE[settings] = tokenizer
        return copy.copy(_SIMPLE[settings])  # its vocabulary is shared, what a user sets is not
    except Exception as error:  # of transformers, the hub, the network: anything may come out
        lines = str(error).splitlines() or [""]
        raise OSError(
            f"the tokenizer of {name} cannot be had ({type(error).__name__}: {lines[0]:.200}): open_clip takes it from "
            "the network where the architecture names one or is called siglip; use local-dir:FOLDER, a folder that "
            "holds it, or rename the architecture"
        ) from error


def starts_random(name: str, pretrained: str) -> bool:
    """Whether load_clip draws random weights: of an architecture without weights."""
    return not pretrained and folder_of(name) is None and not name.startswith("hf-hub:")


def _register(path: str) -> str:
    """Make an architecture JSON known to open_clip under its file name."""
    file = Path(path)
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:  # also text that is not UTF-8
        raise ValueError(f"model config {path} is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"model config {path} must be a JSON object, not {type(config).__name__}")
    missing = [key for key in ("embed_dim", "vision_cfg", "text_cfg") if key not in config]
    if missing:
        hint = f"; for a folder written by open_clip use local-dir:{file.parent}" if "model_cfg" in config else ""
        raise ValueError(f"model config {path} lacks {', '.join(missing)}{hint}")
    known = open_clip.get_model_config(file.stem)
    if known is not None and known != config:
        raise ValueError(f"model config {path}: {file.stem} is already the name of another model, rename the file")
    open_clip.add_model_config(file)
    return file.stem


def _check_name(name: str) -> None:
    known = open_clip.list_models()
    if name.replace("/", "-") not in known:
        near = difflib.get_close_matches(name, known, 1)
        hint = f", did you mean {near[0]!r}?" if near else "; open_clip.list_models() lists them"
        raise ValueError(f"unknown model {name!r}{hint}")


def _check_pretrained(name: str, pretrained: str) -> None:
    tags = open_clip.list_pretrained_tags_by_model(name)
    if not pretrained or pretrained in tags or Path(pretrained).is_file():
        return
    if not tags:
        raise ValueError(
            f"{name} has no weights in open_clip, so {pretrained!r} is none of its: give a weights file, or nothing "
            "(in a command model.pretrained=) for random weights"
        )
    near = difflib.get_close_matches(pretrained, tags, 1)
    hint = f", did you mean {near[0]!r}?" if near else ""
    raise ValueError(f"unknown tag {pretrained!r} for {name}{hint} Known: {', '.join(tags)}; or a file")
