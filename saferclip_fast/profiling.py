"""Where a step's time goes: some steps under torch.profiler, a trace for the eye and a table."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from torch.profiler import profile, record_function, schedule

from .files import atomic_write

WARM_UP = 3  # steps before the first that counts: allocations, kernels loaded or compiled
PARTS = ("embed", "objective", "backward", "optimizer")

part = record_function  # names a part of a step in the trace; nearly free when nothing records


@contextmanager
def profile_steps(steps: int, folder: Path) -> Iterator[Callable[[], None]]:
    """Inside, call what is given after every step: after WARM_UP, `steps` of them are recorded.

    Writes folder/trace.json, which chrome://tracing and ui.perfetto.dev show, and folder/table.txt: the time of each
    part of a step, then of each operator. `steps` = 0: nothing happens.
    """
    if not steps:
        yield lambda: None
        return
    folder.mkdir(parents=True, exist_ok=True)
    plan = schedule(wait=0, warmup=WARM_UP, active=steps, repeat=1)
    with profile(schedule=plan, on_trace_ready=lambda recorded: _write(recorded, steps, folder)) as recorder:
        yield recorder.step


def _write(recorder: profile, steps: int, folder: Path) -> None:
    recorder.export_chrome_trace(str(folder / "trace.json"))
    events = recorder.key_averages()
    lines = [f"milliseconds a step, mean of {steps}"]
    for event in events:
        if event.key in PARTS and event.cpu_time_total:  # the device's own copy of a range has no CPU time
            device = f"{event.device_time_total / steps / 1e3:10.2f} device" if event.device_time_total else ""
            lines.append(f"  {event.key:10s}{event.cpu_time_total / steps / 1e3:10.2f} host{device}")
    on_device = any(event.self_device_time_total for event in events)
    table = events.table(sort_by="self_device_time_total" if on_device else "self_cpu_time_total", row_limit=40)
    with atomic_write(folder / "table.txt") as file:
        file.write_text("\n".join([*lines, "", table, ""]), encoding="utf-8")
