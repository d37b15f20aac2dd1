"""Stopping on SIGTERM or Ctrl-C: between two steps, or at once where what is done is kept anyway."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Stopped(BaseException):
    """SIGTERM or Ctrl-C (`number`) came."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


@contextmanager
def stop_at_once() -> Iterator[None]:
    """Inside, SIGTERM and Ctrl-C raise Stopped; for work that goes on where it was, such as filling caches."""

    def stop(number: int, _frame: object) -> None:
        raise Stopped(number)

    with _handler(stop):
        yield


@contextmanager
def stop_signals(say: bool = False) -> Iterator[list[int]]:
    """Inside, SIGTERM and Ctrl-C are noted in the yielded list; a second Ctrl-C interrupts at once.

    say: answer on standard error, since a step may take minutes.
    """
    noted: list[int] = []

    def note(number: int, _frame: object) -> None:
        if number == signal.SIGINT and noted:
            raise KeyboardInterrupt
        noted.append(number)
        if say:  # not print: the signal may come inside another one
            line = f"\n{signal.Signals(number).name}: stops and saves after this step; Ctrl-C again stops at once\n"
            os.write(2, line.encode())

    with _handler(note):
        yield noted


@contextmanager
def _handler(function: Callable[[int, object], None]) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():  # of a notebook or a server: signals are not its own
        yield
        return
    before = {number: signal.signal(number, function) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def ignore_stop_signals(_worker: int) -> None:
    """Loader processes leave stopping to the main one, which gets the same signal."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
