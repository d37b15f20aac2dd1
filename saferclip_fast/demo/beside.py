"""Another command in a process of its own, while this one works."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence

from ..errors import UserError
from ..runtime.stop import Stopped, stop_at_once


@contextlib.contextmanager
def beside(words: Sequence[str]) -> Iterator[Callable[[], None]]:
    """Inside, `python -m WORDS` runs. What is yielded waits for its end.

    It is asked to stop (SIGTERM) where the body ends before it does, by an error or a signal, and waited for.

    Raises, in what is yielded:
        UserError: the command failed; its output is in the message.
        SystemExit: a signal came; the command has been asked to stop, too.
    """
    with tempfile.TemporaryFile("w+", errors="replace") as output:
        command = subprocess.Popen([sys.executable, "-m", *words], stdout=output, stderr=subprocess.STDOUT)

        def wait() -> None:
            try:
                with stop_at_once():
                    code = command.wait()
            except Stopped as stop:
                raise SystemExit(128 + stop.number) from None
            if code:
                output.seek(0)
                raise UserError(f"{' '.join(words)}\nended with {code}:\n{output.read().strip()}")

        try:
            yield wait
        finally:
            if command.poll() is None:
                command.terminate()
            command.wait()
