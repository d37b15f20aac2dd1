"""A child of os.fork has none of the threads that torch waits for: it goes on with one, instead of waiting forever."""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable

import torch

log = logging.getLogger("saferclip_fast")
_alone = False  # this process is such a child, and has not said so


def watch(forget: Callable[[], None]) -> None:
    """From now on children that are forked have one thread. Called before the first op of a process or of its kind.

    A child says so when an op runs in it: a loader's worker, which has one thread anyway, never does. `forget` makes
    the next op of any kind the first one, in the child.
    """
    global _alone
    _register(forget)
    if _alone:
        _alone = False
        log.warning(
            "process %d was forked after ops had used threads, and goes on with one: start workers with "
            'multiprocessing.get_context("spawn"), or before the first op, to have more',
            os.getpid(),
        )


@functools.cache
def _register(forget: Callable[[], None]) -> None:
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=functools.partial(_go_on_alone, forget))


def _go_on_alone(forget: Callable[[], None]) -> None:
    global _alone
    if torch.get_num_threads() > 1:
        torch.set_num_threads(1)
        _alone = True
        forget()
