"""Labels by degrees against labels of 0 and 1: python -m benchmarks.quality.scores --photos FILE.tar

Each text and image of the unsafe side has a score s, drawn from Beta(0.6, 0.6), and is unsafe with that very
probability; else the sample's safe text or image stands in its place. So rounded scores are wrong for 20 % of them.
Trained with the truth, with rounded scores and with the scores, and evaluated on held-out samples that are all unsafe.
Writes scores.json to --out. Stopped at any moment, the same command goes on with what is missing.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.quality.comparison import score
from benchmarks.quality.runs import FROZEN, Plan, Run, parse, parser, perform_all, source_of, spread
from benchmarks.quality.tables import COLUMNS, over_seeds, table
from saferclip_fast.data import open_quadruplets
from saferclip_fast.data.memory import keep
from saferclip_fast.storage.files import save_json

SHAPE = 0.6  # of the Beta distribution: 20 % of what it draws is on the wrong side of a half
LABELS = ("truth", "rounded scores", "scores")
OPTIONS = {"scenes": (), "photos": ("objective.page=0.12",)}  # the comparison's choice
SCORE = "score"


def tables_of(plan: Plan, data: str, seed: int) -> dict[str, Path]:
    """The training quadruplets with each kind of label, as JSON Lines."""
    records = open_quadruplets(source_of(plan, Run(data, FROZEN, seed))).records
    generator = np.random.default_rng(seed)
    scores = generator.beta(SHAPE, SHAPE, size=(len(records), 2)).round(4)
    unsafe = generator.random(scores.shape) < scores
    labels = {"truth": unsafe.astype(int), "rounded scores": (scores >= 0.5).astype(int), "scores": scores}
    found = {}
    for name, values in labels.items():
        rows = [
            {
                "safe_text": record.safe_text,
                "safe_image": record.safe_image.load(),
                "unsafe_text": record.unsafe_text if unsafe[i, 0] else record.safe_text,
                "unsafe_image": (record.unsafe_image if unsafe[i, 1] else record.safe_image).load(),
                "unsafe_text_label": values[i, 0],
                "unsafe_image_label": values[i, 1],
            }
            for i, record in enumerate(records)
        ]
        found[name] = Path(keep(rows, plan.out / "data" / f"{data}-{seed}", progress=False).source)
    return found


def runs_of(plan: Plan, data: str, seed: int) -> list[Run]:
    """The frozen model, and a fine-tuning for each kind of label."""
    tables = tables_of(plan, data, seed)
    return [
        Run(data, FROZEN, seed),
        *(Run(data, name, seed, (f"data.train={tables[name]}", *OPTIONS[data])) for name in LABELS),
    ]


def summarize(results: Mapping[Run, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A row for each data set and kind of label: mean and standard deviation over seeds of every figure."""
    rows = []
    for data, name in dict.fromkeys(run[:2] for run in results):
        mine = [run for run in results if run[:2] == (data, name)]
        found = [results[run]["metrics"] for run in mine]
        frozen = [results[Run(data, FROZEN, run.seed)]["metrics"] for run in mine]
        scored = {SCORE: spread(score(*pair) for pair in zip(found, frozen, strict=True))}
        rows.append({"data": data, "name": name, "metrics": over_seeds(found) | scored})
    return rows


WAYS = {  # to redirect and to hold by a score v
    "STAR-DSS: v, 1 - v": lambda v: (v, 1 - v),
    "rounded scores": lambda v: (v >= 0.5, v < 0.5),
    "ours: max(0, 2 v - 1), max(0, 1 - 2 v)": lambda v: (np.maximum(0, 2 * v - 1), np.maximum(0, 1 - 2 * v)),
}


def redirected(way: str) -> float:
    """The part of the weight of what is truly unsafe that redirects it; the rest holds it where it is."""
    v = np.random.default_rng(0).beta(SHAPE, SHAPE, 10**6)
    redirects, holds = WAYS[way](v)
    return float((v * redirects).sum() / (v * redirects + v * holds).sum())


def table_of(rows: Sequence[Mapping[str, Any]], data: str) -> str:
    """The rows of one data set, as Markdown."""
    columns = {name: COLUMNS[name] for name in ("unsafe_rate@10", "zero_shot", "S-V.text_to_image@1")}
    return table((row for row in rows if row["data"] == data), columns | {SCORE: "score"})


def main() -> None:
    options = parser(__doc__, "scores")
    options.add_argument("--seeds", type=int, default=3, help="how many seeds (default: 3)")
    options.add_argument("--first-seed", type=int, default=0, help="the first of them (default: 0)")
    options.add_argument("--workers", type=int, default=2, help="processes, one thread each (default: 2)")
    given, plan, data = parse(options)
    seeds = range(given.first_seed, given.first_seed + given.seeds)
    runs = [run for name in data for seed in seeds for run in runs_of(plan, name, seed)]
    rows = summarize(perform_all(plan, runs, given.workers))
    save_json(given.out / "scores.json", {"seeds": list(seeds), "shape": SHAPE, "rows": rows})
    for way in WAYS:
        print(f"{way}: {redirected(way):.2f} of the weight of what is unsafe redirects it")
    for name in data:
        mine = {row["name"]: row for row in rows if row["data"] == name}
        print(f"{name}\n\n{table_of(rows, name)}\n")
        for figure in ("unsafe_rate@10", "zero_shot", SCORE):
            pairs = zip(*(mine[label]["metrics"][figure]["seeds"] for label in LABELS[1:]), strict=True)
            change = [after - before for before, after in pairs]
            deviation = statistics.stdev(change) if len(change) > 1 else 0.0
            print(f"scores - rounded scores, {figure}: {statistics.mean(change):+.3f} ± {deviation:.3f}")


if __name__ == "__main__":
    main()
