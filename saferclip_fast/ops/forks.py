"""A child of os.fork has none of the threads that torch waits for: it goes on with one, instead of waiting forever."""

from __future__ import annotations

import functools
import logging
import os

import torch

log = logging.getLogger("saferclip_fast")


@functools.cache
def watch() -> None:
    """From now on children that are forked have one thread. Called when an op is about to use several."""
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=_go_on_alone)


def _go_on_alone() -> None:
    if torch.get_num_threads() > 1:
        torch.set_num_threads(1)
        log.warning(
            "process %d was forked after ops had used threads, and goes on with one: start workers with "
            'multiprocessing.get_context("spawn"), or before the first op, to have more',
            os.getpid(),
        )
