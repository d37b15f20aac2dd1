"""The default objective at the demo's size, several seeds: python -m benchmarks.quality.full_size --photos FILE.tar

The demo shows one seed; here are three, of scenes and, with --photos, of photographs: 3,000 training quadruplets, 9
epochs, the demo's adapters and learning rate, figures on test data that chose nothing, in a gallery of 1,000 safe and
1,000 unsafe items. Writes full_size.json to --out. Stopped at any moment, the same command goes on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.quality.geometry import OPTIONS
from benchmarks.quality.runs import FROZEN, Plan, Run, parse, parser, perform_all, spread
from benchmarks.quality.tables import over_seeds, table
from saferclip_fast.config import load_config
from saferclip_fast.demo.job import OURS, QUADRUPLETS
from saferclip_fast.results import CUTOFFS, UNSAFE_FOUND, at
from saferclip_fast.storage.files import save_json


def first_place(search: str) -> str:
    """The metric of where a search finds its first unsafe item."""
    return f"{search.partition('_finds')[0]}_first_unsafe_rank"


def runs_of(data: Sequence[str], seeds: Sequence[int]) -> list[Run]:
    """The frozen model and ours, of each data set and seed."""
    batch = f"train.batch_size={load_config('demo').train.batch_size}"  # the plan's is that of runs an eighth as long
    return [
        Run(name, model, seed, () if model == FROZEN else (batch, *OPTIONS[name]))
        for name in data
        for seed in seeds
        for model in (FROZEN, OURS)
    ]


def summarize(results: Mapping[Run, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A row for each data set and model: mean, standard deviation and values of every figure over seeds."""
    rows = []
    for data, name in dict.fromkeys(run[:2] for run in results):
        mine = [run for run in results if run[:2] == (data, name)]
        found = [results[run]["metrics"] for run in mine]
        rates = [name for search in UNSAFE_FOUND for name in (first_place(search), *(at(search, k) for k in CUTOFFS))]
        figures = over_seeds(found) | {rate: spread(metrics[rate] for metrics in found) for rate in rates}
        rows.append({"data": data, "name": name, "options": mine[0].options, "metrics": figures})
    return rows


def at_every_rank(rows: Sequence[Mapping[str, Any]], data: str) -> str:
    """The four unsafe rates at each K and the first unsafe item's mean place, with the frozen model's, as Markdown."""
    ours, frozen = ({row["name"]: row["metrics"] for row in rows if row["data"] == data}[n] for n in (OURS, FROZEN))
    heads = ["an unsafe item among the first", *map(str, CUTOFFS), "frozen, 10 / 20", "its mean place (frozen)"]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for name in UNSAFE_FOUND:
        cells = [f"{ours[at(name, k)]['mean']:.3f} ± {ours[at(name, k)]['std']:.3f}" for k in CUTOFFS]
        before = " / ".join(f"{frozen[at(name, k)]['mean']:.3f}" for k in (10, 20))
        place = "{:.0f} ({:.0f})".format(*(model[first_place(name)]["mean"] for model in (ours, frozen)))
        lines.append(f"| {name.replace('_', ' ').replace(' finds', ':')} | {' | '.join(cells)} | {before} | {place} |")
    return "\n".join(lines)


def main() -> None:
    options = parser(__doc__, "full_size")
    options.add_argument("--seeds", type=int, default=3, help="how many seeds (default: 3)")
    options.add_argument("--workers", type=int, default=2, help="processes, one thread each (default: 2)")
    given, small, data = parse(options)
    plan = Plan(small.out, small.cache, small.photos, QUADRUPLETS, load_config("demo").train.epochs)
    seeds = range(given.seeds)
    rows = summarize(perform_all(plan, runs_of(data, seeds), given.workers))
    save_json(given.out / "full_size.json", {"seeds": list(seeds), "rows": rows})
    for name in data:
        print(f"\n{name}\n\n{at_every_rank(rows, name)}\n\n{table(row for row in rows if row['data'] == name)}")


if __name__ == "__main__":
    main()
