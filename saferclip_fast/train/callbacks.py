"""What a caller is told while a run goes on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeVar

Info = TypeVar("Info")


@dataclass(frozen=True)
class StepInfo:
    """A step that was made."""

    step: int  # from 1, over the whole run
    steps: int  # of the whole run
    epoch: int  # from 1
    metrics: Mapping[str, float]  # means since the last logged step (log.every_steps); empty between


@dataclass(frozen=True)
class ValidationInfo:
    """A validation that was made."""

    step: int
    epoch: int
    metrics: Mapping[str, float]  # means of the loss and its terms, recall and recall_sum
    best: bool  # the best so far, by validation.metric


class StopTraining(Exception):
    """Raised by a callback to end training here as if its last epoch were over: validated, saved, exported."""


ASKED = 1 << 10  # stands where a signal's number would, which is less


@dataclass(frozen=True)
class Callbacks:
    """Functions that the first rank calls; what they return is not looked at.

    StopTraining ends training early. Anything else that they raise ends the run, which goes on from its last checkpoint
    with resume=auto.
    """

    on_step: Callable[[StepInfo], object] | None = None
    on_validation: Callable[[ValidationInfo], object] | None = None


def asks_to_stop(callback: Callable[[Info], object] | None, info: Info) -> bool:
    """Tell the callback, if there is one; whether it asks to stop."""
    try:
        if callback:
            callback(info)
    except StopTraining:
        return True
    return False
