"""The demo's size, several seeds: python -m benchmarks.quality.full_size --photos FILE.tar

The demo shows one seed; here are three, of scenes and, with --photos, of photographs: 3,000 training quadruplets, 9
epochs, figures on test data that chose nothing, in a gallery of 1,000 safe and 1,000 unsafe items. Ours and SafeR-CLIP
have the demo's adapters and learning rate. Safe-CLIP has its authors' adapters and early stopping, and the best of
RATES on validation data, by the comparison's score. Writes full_size.json to --out. Stopped at any moment, the same
command goes on.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.quality.comparison import score
from benchmarks.quality.geometry import OPTIONS
from benchmarks.quality.runs import FROZEN, HELD_OUT, VALIDATION_SEED, Plan, Run, parse, parser, perform_all, spread
from benchmarks.quality.tables import over_seeds, table
from saferclip_fast.config import load_config
from saferclip_fast.demo.job import BASELINE, BASELINE_OPTIONS, OURS, QUADRUPLETS
from saferclip_fast.results import CUTOFFS, UNSAFE_FOUND, at
from saferclip_fast.storage.files import save_json

PAPER = "SafeR-CLIP"  # the paper's objective, with loss weights of ours, since the paper's are not known
RATES = ("1e-3", "3e-4", "3e-3")  # the first is the authors'
VALIDATED_ON = 300  # quadruplets that early stopping looks at


def first_place(search: str) -> str:
    """The metric of where a search finds its first unsafe item."""
    return f"{search.partition('_finds')[0]}_first_unsafe_rank"


def run_of(plan: Plan, data: str, model: str, seed: int, rate: str = RATES[0]) -> Run:
    """One fine-tuning, or the frozen model. Early stopping looks at scenes, or photographs, of its own."""
    batch = f"train.batch_size={load_config('demo').train.batch_size}"  # the plan's is that of runs an eighth as long
    watched = f"n={VALIDATED_ON},seed={VALIDATION_SEED + 1 + seed},split=test"
    source = f"scenes:{watched}" if data == "scenes" else f"photos:path={plan.photos},{watched},half=odd"
    options: dict[str, tuple[str, ...]] = {
        FROZEN: (),
        OURS: (batch, *OPTIONS[data]),
        PAPER: (batch, "objective.preset=paper", "validation.final=last"),
        BASELINE: (batch, *BASELINE_OPTIONS, f"optimizer.lr={rate}", f"data.val={source},mismatch=0.7"),
    }
    return Run(data, model, seed, options[model])


def rates_of(plan: Plan, data: Sequence[str], workers: int) -> list[dict[str, Any]]:
    """Safe-CLIP's score with each rate on validation data; "chosen" marks the best of each data set."""
    frozen = {name: run_of(plan, name, FROZEN, VALIDATION_SEED) for name in data}
    runs = {(name, rate): run_of(plan, name, BASELINE, VALIDATION_SEED, rate) for name in data for rate in RATES}
    results = perform_all(plan, [*frozen.values(), *runs.values()], workers)
    before = {name: results[run]["metrics"] for name, run in frozen.items()}
    scores = {(name, rate): score(results[run]["metrics"], before[name]) for (name, rate), run in runs.items()}
    best = {name: max(scores[name, rate] for rate in RATES) for name in data}
    return [
        {"data": name, "method": BASELINE, "rate": rate, "score": value, "chosen": value == best[name]}
        for (name, rate), value in scores.items()
    ]


def summarize(results: Mapping[Run, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A row for each data set and model: mean, standard deviation and values of every figure over seeds."""
    rows = []
    for data, name in dict.fromkeys(run[:2] for run in results):
        mine = [run for run in results if run[:2] == (data, name)]
        found = [results[run]["metrics"] for run in mine]
        rates = [name for search in UNSAFE_FOUND for name in (first_place(search), *(at(search, k) for k in CUTOFFS))]
        figures = over_seeds(found) | {rate: spread(metrics[rate] for metrics in found) for rate in rates}
        options = [re.sub("path=[^,]*", "path=FILE.tar", option) for option in mine[0].options]  # not this machine's
        rows.append({"data": data, "name": name, "options": options, "metrics": figures})
    return rows


def at_every_rank(rows: Sequence[Mapping[str, Any]], data: str) -> str:
    """The four unsafe rates at each K and the first unsafe item's mean place, with the frozen model's, as Markdown."""
    ours, frozen = ({row["name"]: row["metrics"] for row in rows if row["data"] == data}[n] for n in (OURS, FROZEN))
    heads = [
        "an unsafe item among the first",
        *map(str, CUTOFFS),
        "frozen, 10 / 20",
        f"its mean place, of {2 * HELD_OUT:,} (frozen)",
    ]
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
    tried = rates_of(plan, data, given.workers)
    rate = {entry["data"]: entry["rate"] for entry in tried if entry["chosen"]}
    runs = [
        run_of(plan, name, model, seed, rate[name])
        for name in data
        for model in (FROZEN, OURS, PAPER, BASELINE)
        for seed in seeds
    ]
    rows = summarize(perform_all(plan, runs, given.workers))
    save_json(given.out / "full_size.json", {"seeds": list(seeds), "tried": tried, "rows": rows})
    for name in data:
        print(f"\n{name}\n\n{at_every_rank(rows, name)}\n\n{table(row for row in rows if row['data'] == name)}")


if __name__ == "__main__":
    main()
