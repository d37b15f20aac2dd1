"""Stopping on SIGTERM or Ctrl-C between two steps instead of in the middle of one."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """Inside, SIGTERM and Ctrl-C are noted in the yielded list; a second Ctrl-C interrupts at once."""
    noted: list[int] = []

    def note(number: int, _frame: object) -> None:
        if number == signal.SIGINT and noted:
            raise KeyboardInterrupt
        noted.append(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield noted
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def ignore_stop_signals(_worker: int) -> None:
    """Loader processes leave stopping to the main one, which gets the same signal."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
