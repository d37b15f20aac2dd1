"""Where a step's time goes: some steps under torch.profiler, a trace for the eye and a table."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch.profiler import profile, record_function, schedule

from ..storage.files import atomic_write

WARM_UP = 3  # steps before the first that counts: allocations, kernels loaded or compiled
PARTS = ("data", "embed", "objective", "backward", "optimizer")

part = record_function  # names a part of a step in the trace; nearly free when nothing records


def marked(loader: Iterable[Any]) -> Iterator[Any]:
    """Its batches; waiting for each is the trace's part "data"."""
    batches = iter(loader)
    while True:
        with part("data"):
            batch = next(batches, None)
        if batch is None:
            return
        yield batch


@contextmanager
def profile_steps(steps: int, folder: Path) -> Iterator[Callable[[], None]]:
    """Inside, call what is given after every step: after WARM_UP, `steps` of them are recorded.

    Writes folder/trace.json, which chrome://tracing and ui.perfetto.dev show, and folder/table.txt: the time of each
    part of a step, then of each operator. A run that ends earlier records what it has, and warns if that is nothing.
    `steps` = 0: nothing happens.
    """
    if not steps:
        yield lambda: None
        return
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "table.txt").unlink(missing_ok=True)
    plan = schedule(wait=0, warmup=WARM_UP, active=steps, repeat=1)
    with profile(schedule=plan, on_trace_ready=lambda recorded: _write(recorded, folder)) as recorder:
        yield recorder.step
    if not (folder / "table.txt").is_file():
        warnings.warn(f"the run ended within the {WARM_UP} steps that warm the profile up: no profile", stacklevel=3)


def _write(recorder: profile, folder: Path) -> None:
    events = recorder.key_averages()
    # the device's own copy of a range has no time on the host
    of_parts = {event.key: event for event in events if event.key in PARTS and event.cpu_time_total}
    if "optimizer" not in of_parts:
        return
    steps = of_parts["optimizer"].count
    lines = [f"milliseconds a step, mean of {steps}"]
    for name, event in ((name, of_parts[name]) for name in PARTS):
        host, device = event.cpu_time_total / steps / 1e3, event.device_time_total / steps / 1e3
        lines.append(f"  {name:10s}{host:10.2f} host" + (f"{device:10.2f} device" if device else ""))
    on_device = any(event.self_device_time_total for event in events)
    table = events.table(sort_by="self_device_time_total" if on_device else "self_cpu_time_total", row_limit=40)
    with atomic_write(folder / "trace.json") as file:
        recorder.export_chrome_trace(str(file))
    with atomic_write(folder / "table.txt") as file:
        file.write_text("\n".join([*lines, "", table, ""]), encoding="utf-8")
