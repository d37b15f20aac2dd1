"""One process at a time writes to a folder; the next one is told which it is."""

import os
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from saferclip_fast.storage.claim import InUseError, claim
from saferclip_fast.storage.files import check_writable, remove_leftovers

HOLD = """
import sys
from saferclip_fast.storage.claim import claim
with claim(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path: Path):
    """Another process that holds tmp_path / "run"."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / "run")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def test_a_second_process_is_told_of_the_first(tmp_path: Path, holder) -> None:
    where = f"process {holder.pid} on {socket.gethostname()}"
    with pytest.raises(InUseError, match=rf"run is in use by {where}: wait for it"), claim(tmp_path / "run"):
        pass
    holder.kill()  # however it ends
    holder.wait()
    with claim(tmp_path / "run"):
        (tmp_path / "run" / "file").write_text("x")
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["file"]


@pytest.mark.parametrize("command", ["train", "evaluate", "export", "demo"])
def test_every_command_that_writes_a_folder_claims_it_first(tmp_path: Path, holder, command: str, capsys) -> None:
    """No model is named that there is: the claim comes before one is opened."""
    from saferclip_fast.demo.__main__ import main as demo
    from saferclip_fast.evaluate.__main__ import main as evaluate
    from saferclip_fast.export.__main__ import main as export
    from saferclip_fast.train.__main__ import main as train

    run, none = str(tmp_path / "run"), str(tmp_path / "none")
    words = {
        "train": lambda: train([f"run_dir={run}", f"model.name={none}", "data.train=scenes:n=9", "resume=auto"]),
        "evaluate": lambda: evaluate([str(tmp_path), "--out", run]),
        "export": lambda: export([str(tmp_path), "--format", "open_clip", "--out", run]),
        "demo": lambda: demo(["--run-dir", run, "--cache-dir", none]),
    }
    assert words[command]() == 2
    assert f"run is in use by process {holder.pid} on " in capsys.readouterr().err


def test_the_same_thread_may_claim_again_and_another_may_not(tmp_path: Path) -> None:
    found = []

    def other() -> None:
        try:
            with claim(tmp_path / "run"):
                found.append("claimed")
        except InUseError as error:
            found.append(str(error))

    with claim(tmp_path / "run"):
        with claim(tmp_path / "run"):
            pass
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    assert "in use by this process, in another thread" in found[0]
    assert not (tmp_path / "run").exists()  # nothing was written


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with (
        pytest.raises(OSError, match=r"cannot write to .*file/run \(Not a directory\)"),
        claim(tmp_path / "file" / "run"),
    ):
        pass
    with pytest.raises(OSError, match=r"cannot write to .*file/run \(Not a directory\): data.cache_dir names another"):
        check_writable(tmp_path / "file" / "run", "data.cache_dir")
    check_writable(tmp_path / "new", "data.cache_dir")
    assert not list((tmp_path / "new").iterdir())


def test_leftovers_of_the_dead_go_and_those_of_the_living_stay(tmp_path: Path, holder) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    names = [f".a.json.{number}.tmp" for number in (holder.pid, dead.pid, os.getpid())] + [".a.tmp", ".a.json.x.tmp"]
    for name in names:
        (tmp_path / name).write_text("x")
    remove_leftovers(tmp_path)
    assert [path.name for path in tmp_path.glob(".a*")] == names[:1]
