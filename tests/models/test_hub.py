"""The hub that does not answer: told at once, with the remedy."""

import socket
import time

import pytest
from huggingface_hub import constants

from saferclip_fast.models import hub, load_clip


@pytest.fixture
def silent(monkeypatch, tmp_path):
    """An address where nobody listens, and no files from before."""
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        port = place.getsockname()[1]
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{port}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    return constants.ENDPOINT


def test_a_hub_that_does_not_answer_is_told_at_once_with_the_remedy(silent, capsys):
    start = time.monotonic()
    with pytest.raises(
        OSError, match=rf"ViT-B-32 openai: not on this machine, and {silent} does not .*local-dir:FOLDER"
    ):
        load_clip("ViT-B-32", "openai")
    assert time.monotonic() - start < 20, "huggingface_hub waits longer between its six tries"
    assert capsys.readouterr().err.startswith(f"ViT-B-32 openai: asking {silent}\n")
    assert constants.HF_HUB_OFFLINE is False


def test_a_hub_that_accepts_nothing_costs_a_few_seconds(monkeypatch):
    monkeypatch.setattr(hub, "PATIENCE", 0.1)
    with socket.socket() as full:  # listens, but its queue is full: connections wait
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        waiting = [socket.socket() for _ in range(4)]
        for one in waiting:
            one.setblocking(False)
            one.connect_ex(full.getsockname())
        start = time.monotonic()
        for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
            monkeypatch.delenv(name, raising=False)
        assert not hub._answers(f"http://127.0.0.1:{full.getsockname()[1]}") and time.monotonic() - start < 2
        for one in waiting:
            one.close()


def test_what_lies_on_this_machine_asks_nobody(weights, silent, capsys):
    load_clip("ViT-tiny-8-32", str(weights))
    assert capsys.readouterr().err == ""


def test_an_answer_that_says_no_is_handed_on(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "_answers", lambda url: True)
    with pytest.raises(ValueError, match="bad weights"), hub.asking_hub("x"):
        raise ValueError("bad weights")
