"""A command beside the caller: its end is waited for, its failure is told, and it does not outlive the caller."""

import os
import subprocess
import sys
import time

import pytest

from saferclip_fast.demo.beside import beside
from saferclip_fast.errors import UserError

ONCE = ["timeit", "--number", "1", "--repeat", "1"]  # a module that runs what it is given


def sleeping(file):
    """A command that writes its number to `file` and sleeps."""
    return [*ONCE, f"import os, time; open({str(file)!r}, 'w').write(str(os.getpid())); time.sleep(100)"]


def number_in(file):
    for _ in range(600):
        if file.exists() and file.read_text():
            return int(file.read_text())
        time.sleep(0.1)
    raise TimeoutError(file)


def gone(process):
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return True
    return False


def test_what_is_yielded_waits_for_the_command(tmp_path):
    file = tmp_path / "done"
    with beside([*ONCE, f"import time; time.sleep(0.5); open({str(file)!r}, 'w')"]) as wait:
        assert not file.exists()
        wait()
        assert file.exists()


def test_a_failure_is_told_with_what_the_command_printed():
    told = pytest.raises(UserError, match=r"(?s)timeit .*ended with 1:.*no such luck")
    with told, beside([*ONCE, "no such luck"]) as wait:
        wait()


def test_a_command_does_not_outlive_an_error_of_the_caller(tmp_path):
    with pytest.raises(ZeroDivisionError), beside(sleeping(tmp_path / "number")):
        process = number_in(tmp_path / "number")
        assert not gone(process)
        1 / 0  # noqa: B018
    assert gone(process)


def test_a_signal_stops_both(tmp_path):
    text = f"""
from saferclip_fast.demo.beside import beside
with beside({sleeping(tmp_path / "number")!r}) as wait:
    print("waits", flush=True)
    wait()
"""
    with subprocess.Popen([sys.executable, "-c", text], stdout=subprocess.PIPE, text=True) as caller:
        assert caller.stdout.readline() == "waits\n"
        process = number_in(tmp_path / "number")
        caller.terminate()
        assert caller.wait(60) == 128 + 15
    assert gone(process)
