"""Measures the backends on this machine and writes the table that backend="auto" uses.

Each op is timed at a few sizes in each dtype on each backend that is usable for the device; the fastest leads from
halfway (in log2 of the work) below its size to halfway above. See `saferclip_fast.ops.choice` for the table's format.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.utils.benchmark import Timer

from ..bank import SafeBank
from ..ops.backends import BACKENDS, built
from ..ops.choice import LEADER, chip_name, select, table
from ..storage.files import save_json

WIDTH = 768  # ViT-L/14
SEARCHES = ((1, 1_000), (64, 10_000), (1_024, 30_000))  # queries, bank rows
BATCHES = (48, 256, 1_024)
DTYPES = {"cpu": (torch.float32, torch.bfloat16), "cuda": (torch.float32, torch.bfloat16, torch.float16)}


def cases(op: str, device: str, dtype: torch.dtype) -> Iterator[tuple[int, tuple]]:
    """(work, arguments) at increasing work."""

    def rows(count: int) -> torch.Tensor:
        return F.normalize(torch.randn(count, WIDTH, device=device), dim=-1).to(dtype)

    if op == "nearest_safe":
        for queries, bank_rows in SEARCHES:
            bank = SafeBank.from_unit(rows(bank_rows), rows(bank_rows), {}).pack()  # as training has it
            yield queries * bank_rows, (rows(queries), bank.text, 1, bank.packed)
    for batch in BATCHES if op != "nearest_safe" else ():
        embeddings = tuple(rows(batch) for _ in range(4))
        if op == "info_nce_sums":
            yield batch**2, (*embeddings[:2], None, 0, 100.0, False)
            continue
        if op == "preservation_loss":
            yield batch**2, (*embeddings, [1.0, 1.0, 0.2, 0.2], 100.0, True)
        elif op == "neighbor_hinge":
            found = torch.randint(1_000, (batch, 16), device=device)
            guard = F.normalize(torch.randn(1_000, WIDTH + 2, device=device), dim=-1)
            open_scores, shares = torch.ones(batch, 16, device=device), torch.ones(batch, device=device)
            yield 16 * batch, (embeddings[0], guard, found, open_scores, shares, 0.0, 16, True)
        else:
            neighbors = torch.randint(1_000, (batch, 1), device=device)
            ones = torch.ones(batch, 1, device=device)
            shares = torch.full((batch, 4), 1 / batch, device=device)
            options = ([4.0, 4.0, 1.0, 1.0], 1.0, 0.0, False, True)
            yield batch, (*embeddings, rows(1_000), rows(1_000), neighbors, ones, shares, *options)


def seconds(function: Callable, arguments: tuple, min_run_time: float) -> float:
    """Median time of a call, after a first one that compiles and tunes; torch's timer waits for the GPU."""
    function(*arguments)
    timer = Timer("function(*arguments)", globals={"function": function, "arguments": arguments})
    return timer.blocked_autorange(min_run_time=min_run_time).median


def measure(op: str, device: str, dtype: torch.dtype, min_run_time: float) -> list[dict]:
    """Table rows of one op and dtype, for increasing work; the last has no upper end."""
    rows: list[dict] = []
    works = []
    for work, arguments in cases(op, device, dtype):
        taken = {}
        for backend in BACKENDS:
            try:
                kernel = select(op, backend, device, dtype)
            except (ValueError, RuntimeError):  # not for this device
                continue
            try:
                taken[backend] = seconds(kernel, arguments, min_run_time)
            except Exception as error:  # a backend that fails here must not be picked here
                print(f"{op} {device} {dtype}: {backend} failed: {error}", file=sys.stderr)
        order = sorted(taken, key=taken.__getitem__)
        timings = ", ".join(f"{name} {taken[name] * 1e3:.3g} ms" for name in order)
        works.append(work.bit_length())
        rows.append(
            {
                "op": op,
                "device": device,
                "name": chip_name(device),
                "dtype": str(dtype).removeprefix("torch."),
                "below": None,
                "order": order,
                "because": f"measured here at work {work}: {timings}",
            }
        )
    for row, here, above in zip(rows, works, works[1:], strict=False):
        row["below"] = (here + above) // 2
    return rows


def tune(device: str, min_run_time: float, path: Path) -> list[dict]:
    """Measures every op on `device` and replaces this chip's rows in the user's table at `path`."""
    rows = [
        row
        for op in built()["reference"].ops
        if op not in LEADER
        for dtype in DTYPES[device]
        for row in measure(op, device, dtype, min_run_time)
    ]
    kept = []
    if path.exists():
        kept = [row for row in json.loads(path.read_text(encoding="utf-8")) if row["name"] != chip_name(device)]
    save_json(path, rows + kept)
    table.cache_clear()
    return rows
