"""What can be known of a model by its name alone, before torch is imported."""

from __future__ import annotations

from pathlib import Path

# open_clip writes its own names with a slash too ("ViT-B/32")
_NAMES = ("local-dir:", "hf-hub:", "ViT-", "RN")


def check_place(name: str, pretrained: str = "") -> None:
    """Raises FileNotFoundError for an architecture, a folder or a weights file that is not there."""
    if _is_path(name) and not Path(name).exists():
        raise FileNotFoundError(
            f"there is no folder {name}, and unknown model {name!r}: give an open_clip or a CLIPModel folder, or "
            f"hf-hub:{name} for one of the hub"
        )
    if name.startswith("local-dir:") and not Path(name.removeprefix("local-dir:")).is_dir():
        raise FileNotFoundError(f"there is no folder {name.removeprefix('local-dir:')} (model {name})")
    if name.endswith(".json") and not Path(name).is_file():
        raise FileNotFoundError(f"model config {name} not found")
    if ("/" in pretrained or Path(pretrained).suffix) and not Path(pretrained).is_file():
        raise FileNotFoundError(f"weights file {pretrained} not found")


def check_model(model: str) -> None:
    """The same for a folder, a file or "NAME,PRETRAINED"."""
    if Path(model).exists():
        return
    name, _, pretrained = model.partition(",")
    if _is_path(name):
        raise FileNotFoundError(
            f"there is no folder {name}, and unknown model {name!r}: give a run, an open_clip or a CLIPModel folder"
        )
    check_place(name, pretrained)


def check_there(path: Path) -> None:
    """Raises FileNotFoundError where there is nothing at `path`."""
    if not path.exists():
        raise FileNotFoundError(
            f"{path} not found: give a run's folder, an open_clip folder or weights file, or a CLIPModel folder"
        )


def _is_path(name: str) -> bool:
    return "/" in name and not name.startswith(_NAMES) and not name.endswith(".json")
