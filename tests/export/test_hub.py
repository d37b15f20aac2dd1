"""Exports sent to the hub: what is sent, and that its failures cost nothing. The hub is one in memory."""

import types
from pathlib import Path

import huggingface_hub
import pytest
import torch
import yaml
from safetensors import safe_open

import saferclip_fast as sf
from saferclip_fast.export import HubError
from saferclip_fast.export.__main__ import main as command


class Hub:
    """The calls of HfApi, with their arguments as huggingface_hub has them."""

    def __init__(self) -> None:
        self.repos: dict[str, dict] = {}
        self.logged_in, self.broken = True, False

    def whoami(self):
        if not self.logged_in:
            raise OSError("Token is required\nsecond line")
        return {"name": "me"}

    def create_repo(self, repo_id, *, private=None, exist_ok=False, repo_type=None):
        assert exist_ok and repo_type == "model"
        full = repo_id if "/" in repo_id else f"me/{repo_id}"
        self.repos.setdefault(full, {"private": private, "files": {}})
        return huggingface_hub.RepoUrl(f"https://huggingface.co/{full}")

    def upload_folder(self, *, repo_id, folder_path, allow_patterns=None, commit_message=None):
        if self.broken:
            raise ConnectionError("no route to host")
        files = {p.relative_to(folder_path).as_posix(): p for p in Path(folder_path).rglob("*") if p.is_file()}
        kept = huggingface_hub.utils.filter_repo_objects(files, allow_patterns=allow_patterns)
        self.repos[repo_id]["files"] |= {name: files[name].read_bytes() for name in kept}


@pytest.fixture
def hub(monkeypatch):
    hub = Hub()
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: hub)
    return hub


@pytest.fixture(scope="module")
def clip():
    torch.manual_seed(7)
    return sf.load_clip("ViT-tiny-8-32")


@pytest.fixture(scope="module")
def folder(clip, tmp_path_factory):
    return clip.export(tmp_path_factory.mktemp("model")).parent


def head(card: bytes) -> dict:
    return yaml.safe_load(card.decode().split("---")[1])


def test_one_format_lies_at_the_top_with_its_card(hub, clip, tmp_path):
    sf.export(clip, tmp_path / "out", "huggingface", push_to_hub="me/safe", private=True)
    files = hub.repos["me/safe"]["files"]
    assert hub.repos["me/safe"]["private"] and {"config.json", "model.safetensors", "README.md"} <= files.keys()
    assert not any(name.startswith(".") for name in files)
    about = head(files["README.md"])
    assert about["license"] == "other" and about["library_name"] == "transformers"
    assert about["pipeline_tag"] == "zero-shot-image-classification"


def test_several_lie_in_folders_and_nothing_else_is_sent(hub, folder, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "private.txt").write_text("not part of it")
    words = [
        str(folder),
        "--format",
        "open_clip",
        "huggingface",
        "--out",
        str(tmp_path / "out"),
        "--push-to-hub",
        "safe",
    ]
    assert command(words) == 0
    files = hub.repos["me/safe"]["files"]
    assert {
        "README.md",
        "open_clip/README.md",
        "huggingface/config.json",
    } <= files.keys() and "private.txt" not in files
    assert "sent to https://huggingface.co/me/safe" in capsys.readouterr().out


def test_weights_say_that_they_are_of_torch(clip, tmp_path):
    sf.export(clip, tmp_path / "out", ["open_clip", "huggingface"])
    found = list((tmp_path / "out").rglob("*.safetensors"))
    assert len(found) >= 4
    for file in found:
        with safe_open(file, "pt") as weights:
            assert weights.metadata() == {"format": "pt"}, file


@pytest.mark.parametrize(
    "repo, message", [("a/b/c", "no name of a repository"), ("me/safe", "the hub does not know you")]
)
def test_it_is_known_before_anything_is_exported(hub, clip, folder, tmp_path, repo, message, capsys):
    hub.logged_in = False
    with pytest.raises(HubError, match=message) as caught:
        sf.export(clip, tmp_path / "out", push_to_hub=repo)
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()
    words = [str(folder), "--format", "open_clip", "--out", str(tmp_path / "out"), "--push-to-hub", repo]
    assert command(words) == 2 and capsys.readouterr().err.startswith(f"error: --push-to-hub {repo}: {message}")


def test_a_hub_that_fails_leaves_the_export_whole(hub, clip, tmp_path):
    hub.broken = True
    with pytest.raises(HubError, match=r"did not take .*open_clip \(no route to host\); the export itself is whole"):
        sf.export(clip, tmp_path / "out", "open_clip", push_to_hub="me/safe")
    assert (tmp_path / "out" / "open_clip" / "open_clip_model.safetensors").is_file()


def test_without_the_package_it_is_named(monkeypatch):
    from saferclip_fast.export import hub

    monkeypatch.setitem(__import__("sys").modules, "huggingface_hub", None)
    with pytest.raises(ImportError, match="needs huggingface_hub: pip install huggingface_hub"):
        hub.check_hub("me/safe")
    assert isinstance(hub, types.ModuleType)
