"""An export sent to the Hugging Face hub: known to be possible before anything is exported."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import UserError


class HubError(UserError, ValueError):
    """The hub cannot take the export; the message names the repository and the remedy."""


def check_hub(repo: str) -> None:
    """Whether `repo` is a name, and someone is logged in.

    Raises HubError, ImportError where huggingface_hub is missing.
    """
    hub = _hub(repo)
    try:
        hub.utils.validate_repo_id(repo)
    except hub.errors.HFValidationError as error:
        raise HubError(f"--push-to-hub {repo}: no name of a repository (NAME or OWNER/NAME): {error}") from error
    try:
        hub.HfApi().whoami()
    except Exception as error:  # of the network, of the hub, or no token
        raise HubError(
            f"--push-to-hub {repo}: the hub does not know you ({_short(error)}): `hf auth login`, or set HF_TOKEN"
        ) from error


def push(out: Path, formats: Sequence[str], repo: str, private: bool = False) -> str:
    """Send OUT/FORMAT, or OUT where there are several formats, and return the repository's address.

    Nothing on the hub is deleted, and a commit there is whole or absent. Raises HubError.
    """
    api = _hub(repo).HfApi()
    folder, patterns = out / formats[0], None
    if len(formats) > 1:
        folder, patterns = out, ["README.md", *(f"{name}/**" for name in formats)]
    try:
        url = api.create_repo(repo, private=private, exist_ok=True, repo_type="model")
        api.upload_folder(
            repo_id=url.repo_id,
            folder_path=str(folder),
            allow_patterns=patterns,
            commit_message=f"{', '.join(formats)} by saferclip_fast",
        )
    except Exception as error:  # of the network or of the hub
        raise HubError(
            f"--push-to-hub {repo}: the hub did not take {folder} ({_short(error)}); the export itself is whole, and "
            f"`hf upload {repo} {folder}` sends it"
        ) from error
    return str(url)


def _hub(repo: str) -> Any:
    try:
        import huggingface_hub
    except ImportError as error:
        raise ImportError(f"--push-to-hub {repo} needs huggingface_hub: pip install huggingface_hub") from error
    return huggingface_hub


def _short(error: Exception) -> str:
    """The first line of what it says."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
