"""What a large data set takes before the first step: python -m benchmarks.memory.large_data

Made-up rows, from ten thousand to a million: a table whose images are a few small files named again and again, read and
verified; random embeddings in the cache; the bank built and mapped; neighbors searched for 1,024 rows; the curriculum's
order; and what a resumed run does to be where the stopped one was. Each stage is a process of its own: its seconds, the
most memory that it takes beside what was imported, the bytes that it leaves on disk. Writes large_data.json and
large_data.png to --out. Linux.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import multiprocessing
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from benchmarks.harness import extra_memory, machine
from saferclip_fast.bank import SafeBank, ShardedBank
from saferclip_fast.data import CurriculumSampler, open_quadruplets
from saferclip_fast.embeddings import NAMES
from saferclip_fast.runtime.ranks import Ranks
from saferclip_fast.storage import row_cache
from saferclip_fast.storage.files import save_json

matplotlib.use("Agg")
import matplotlib.pyplot as plt

ROWS = (10_000, 30_000, 100_000, 300_000, 1_000_000)
WIDTH = 64  # of the embeddings: time and bytes of the stages that have any grow with it
IMAGES = 64  # files
QUERIES, K = 1_024, 16
TABLE, BANK = "rows.jsonl", "bank.safetensors"
MIB = 1 << 20


def write_table(folder: Path, rows: int) -> None:
    """The quadruplets and their images."""
    for number in range(IMAGES):
        Image.new("RGB", (32, 32), (4 * number, 128, 255 - 4 * number)).save(folder / f"{number}.png")
    with (folder / TABLE).open("w") as file:
        for row in range(rows):
            record = {
                "safe_image": f"{row % IMAGES}.png",
                "safe_text": f"a photograph of thing number {row} on a table in the sun",
                "unsafe_image": f"{(row + 1) % IMAGES}.png",
                "unsafe_text": f"a drawing of hazard number {row} on a table in the sun",
            }
            file.write(json.dumps(record) + "\n")


def read(folder: Path, rows: int) -> dict[str, float]:
    """The table, and how many objects of Python's collector a row is."""
    gc.collect()
    before = len(gc.get_objects())
    dataset = open_quadruplets(folder / TABLE, root=folder, progress=False)
    assert len(dataset) == rows
    return {"objects a row": (len(gc.get_objects()) - before) / rows}


def verify(folder: Path, rows: int) -> dict[str, float]:
    """Every image decoded once, and the content's hash."""
    dataset = open_quadruplets(folder / TABLE, root=folder, progress=False)
    start = time.perf_counter()
    dataset.verify(folder / "cache", progress=False)
    return {"seconds": time.perf_counter() - start}


class _Numbers(Dataset):
    """Rows without content."""

    def __init__(self, rows: int):
        self.rows = rows

    def __len__(self) -> int:
        return self.rows

    def __getitem__(self, index: int) -> int:
        return index


def _together(rows: list[int]) -> dict[str, Tensor]:
    return {"index": torch.tensor(rows)}


def cache(folder: Path, rows: int) -> dict[str, float]:
    """Embeddings, as they come from a model, to the cache's file."""

    def compute(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return dict(zip(NAMES, torch.randn(4, len(batch["index"]), WIDTH), strict=True))

    row_cache.fill(
        folder / "cache",
        "embeddings",
        {"rows": str(rows)},
        _Numbers(rows),
        _together,
        compute,
        batch_size=256,
        num_workers=0,
        title="",
        progress=False,
        ranks=Ranks(),
    )
    return {}


def _embeddings(folder: Path) -> dict[str, Tensor]:
    (path,) = (folder / "cache").glob("embeddings-*.safetensors")
    return row_cache.read(path, NAMES)[0]


def bank(folder: Path, rows: int) -> dict[str, float]:
    """The bank's file, from the cache's."""
    found = _embeddings(folder)
    SafeBank.build(folder / BANK, found["safe_text"], found["safe_image"], torch.arange(rows))
    return {}


def neighbors(folder: Path, rows: int) -> dict[str, float]:
    """The nearest safe rows of QUERIES rows, in the mapped bank; a run asks for each of its rows once."""
    query = _embeddings(folder)["unsafe_text"][:QUERIES]
    ShardedBank(SafeBank.load(folder / BANK), device=torch.device("cpu")).nearest(query, K)
    return {"queries": len(query)}


def curriculum(folder: Path, rows: int) -> dict[str, float]:
    """The order of an epoch of all rows."""
    sampler = CurriculumSampler(torch.rand(rows, generator=torch.Generator().manual_seed(0)))
    assert len(sampler.epoch_indices(3)) == rows
    return {}


def resume(folder: Path, rows: int) -> dict[str, float]:
    """The table again, what verifying found, the mapped rows, and the first sample after the middle of an epoch."""
    dataset = open_quadruplets(folder / TABLE, root=folder, progress=False)
    dataset.verify(folder / "cache", progress=False)
    found = _embeddings(folder)
    sampler = CurriculumSampler(torch.rand(rows, generator=torch.Generator().manual_seed(0)))
    sampler.set_epoch(3, rows // 2)
    found["safe_text"][next(iter(sampler))].sum()
    return {}


STAGES: tuple[Callable[[Path, int], dict[str, float]], ...] = (read, verify, cache, bank, neighbors, curriculum, resume)


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def _measure(stage: Callable[[Path, int], dict[str, float]], folder: Path, rows: int, out: Any) -> None:
    """In a process of its own: the stage's figures, sent through `out`."""
    found: dict[str, Any] = {"stage": stage.__name__, "rows": rows}
    before = _size(folder)

    def call() -> None:
        start = time.perf_counter()
        of_stage = stage(folder, rows)
        found.update({"seconds": time.perf_counter() - start, **of_stage})

    found["MiB"] = extra_memory(call)
    out.send(found | {"disk MiB": (_size(folder) - before) / MIB})


def measure(rows: int, folder: Path) -> list[dict[str, Any]]:
    """Every stage at this size; `folder` is made, and gone afterwards."""
    folder.mkdir(parents=True)
    context, found = multiprocessing.get_context("forkserver"), []
    context.set_forkserver_preload(["benchmarks.harness", "saferclip_fast.embeddings"])  # once, not by each stage
    try:
        write_table(folder, rows)
        for stage in STAGES:
            here, there = context.Pipe(duplex=False)
            process = context.Process(target=_measure, args=(stage, folder, rows, there))
            process.start()
            there.close()
            found.append(here.recv())  # EOFError where the stage failed, which says so itself
            process.join()
            print(found[-1], flush=True)
    finally:
        shutil.rmtree(folder)
    return found


def growth(found: Sequence[Mapping[str, Any]], stage: str, key: str) -> float:
    """The exponent of rows between the two largest sizes: 1 is linear."""
    mine = sorted((row for row in found if row["stage"] == stage), key=lambda row: row["rows"])
    (less, more), ratio = mine[-2:], mine[-1]["rows"] / mine[-2]["rows"]
    return math.log(more[key] / less[key]) / math.log(ratio)


def table(found: Sequence[Mapping[str, Any]]) -> str:
    """Each stage at the largest size, and how it grows, as Markdown."""
    most = max(row["rows"] for row in found)
    lines = [
        f"| stage | seconds, {most:,} rows | grows as rows to the | MiB of memory | bytes a row | MiB on disk |",
        "|---" * 6 + "|",
    ]
    for row in found:
        if row["rows"] == most:
            power = growth(found, row["stage"], "seconds")
            bytes_a_row = row["MiB"] * MIB / most
            lines.append(
                f"| {row['stage']} | {row['seconds']:.1f} | {power:.2f} | {row['MiB']:,.0f} | {bytes_a_row:,.0f} "
                f"| {row['disk MiB']:,.0f} |"
            )
    return "\n".join(lines)


def picture(found: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Seconds and memory of each stage against rows, both axes in powers of ten."""
    figure, panels = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for axes, key, label in zip(panels, ("seconds", "MiB"), ("seconds", "MiB of memory"), strict=True):
        for stage in dict.fromkeys(row["stage"] for row in found):
            mine = [row for row in found if row["stage"] == stage]
            axes.loglog([row["rows"] for row in mine], [max(row[key], 1e-3) for row in mine], "o-", ms=4, label=stage)
        axes.set_xlabel("rows")
        axes.set_ylabel(label)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    panels[1].legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    figure.savefig(path, dpi=100)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS, help="sizes (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/large_data"), help="(%(default)s)")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    found = [row for rows in given.rows for row in measure(rows, given.out / "rows")]
    save_json(given.out / "large_data.json", {"machine": machine(), "width": WIDTH, "rows": found})
    picture(found, given.out / "large_data.png")
    print(table(found))


if __name__ == "__main__":
    main()
