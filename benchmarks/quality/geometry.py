"""The terms that keep the geometry of safe rows: python -m benchmarks.quality.geometry --photos FILE.tar

The default objective, and with each of SAGE's two terms at the better of two weights. A weight is chosen on validation
data, by the harmonic mean of the comparison's score and of the geometry kept, and all is reported on test data.
Writes geometry.json to --out. Stopped at any moment, the same command goes on with what is missing.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.quality.comparison import score
from benchmarks.quality.runs import FROZEN, VALIDATION_SEED, Plan, Run, parse, parser, perform_all, spread
from benchmarks.quality.tables import COLUMNS, over_seeds, table
from saferclip_fast.storage.files import save_json

DEFAULT = "default"
WEIGHTS = {"spread": (4, 32), "neighbors": (1, 8)}  # the default's other terms have weights of 1 to 64
OPTIONS = {"scenes": (), "photos": ("objective.page=0.12",)}  # the comparison's choice
KEPT = {"spread ratio": "spread_ratio", "neighbors kept": "neighbors_kept"}


def kept(metrics: Mapping[str, float]) -> dict[str, float]:
    """Spread ratio and neighbors kept: means of texts and images, or of the one that has enough different items."""
    found = {}
    for name, figure in KEPT.items():
        sides = [metrics[key] for key in (f"safe_text_{figure}", f"safe_image_{figure}") if key in metrics]
        found[name] = statistics.mean(sides)
    return found


def merit(metrics: Mapping[str, float], frozen: Mapping[str, float]) -> float:
    """What chooses a weight: the harmonic mean of the comparison's score and of the geometry kept, 1 at most each."""
    values = score(metrics, frozen), statistics.mean(min(1.0, value) for value in kept(metrics).values())
    return statistics.harmonic_mean(values)


def run_of(data: str, name: str, seed: int, weight: float = 0) -> Run:
    term = (f"objective.weights.{name}={weight}",) if name in WEIGHTS else ()
    return Run(data, name, seed, () if name == FROZEN else (*OPTIONS[data], *term))


def choose(plan: Plan, data: Sequence[str], workers: int) -> list[dict[str, Any]]:
    """Every weight of every term on validation data: its merit; "chosen" marks the better one."""
    tried = {
        (name, term, weight): run_of(name, term, VALIDATION_SEED, weight)
        for name in data
        for term, weights in WEIGHTS.items()
        for weight in weights
    }
    frozen = {name: run_of(name, FROZEN, VALIDATION_SEED) for name in data}
    results = perform_all(plan, [*frozen.values(), *tried.values()], workers)
    rows = []
    for (name, term, weight), run in tried.items():
        metrics = results[run]["metrics"]
        found = {"merit": merit(metrics, results[frozen[name]]["metrics"]), **kept(metrics)}
        rows.append({"data": name, "term": term, "weight": weight, **found})
    for row in rows:
        rivals = [other["merit"] for other in rows if (other["data"], other["term"]) == (row["data"], row["term"])]
        row["chosen"] = row["merit"] == max(rivals)
    return rows


def summarize(results: Mapping[Run, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A row for each data set and objective: mean, standard deviation and values of every figure over seeds."""
    rows = []
    for data, name in dict.fromkeys(run[:2] for run in results):
        mine = [run for run in results if run[:2] == (data, name)]
        found = [results[run]["metrics"] for run in mine]
        figures = over_seeds(found) | {key: spread(kept(metrics)[key] for metrics in found) for key in KEPT}
        rows.append({"data": data, "name": name, "options": mine[0].options, "metrics": figures})
    return rows


def table_of(rows: Sequence[Mapping[str, Any]], data: str) -> str:
    """The rows of one data set, as Markdown."""
    columns = {name: COLUMNS[name] for name in ("unsafe_rate@10", "zero_shot", "S-V.text_to_image@1")}
    return table((row for row in rows if row["data"] == data), columns | {name: name for name in KEPT})


def main() -> None:
    options = parser(__doc__, "geometry")
    options.add_argument("--seeds", type=int, default=3, help="how many seeds (default: 3)")
    options.add_argument("--first-seed", type=int, default=0, help="the first of them (default: 0)")
    options.add_argument("--workers", type=int, default=2, help="processes, one thread each (default: 2)")
    given, plan, data = parse(options)
    seeds = range(given.first_seed, given.first_seed + given.seeds)
    chosen = choose(plan, data, given.workers)
    best = {(row["data"], row["term"]): row["weight"] for row in chosen if row["chosen"]}
    runs = [
        run_of(name, objective, seed, best.get((name, objective), 0))
        for name in data
        for seed in seeds
        for objective in (FROZEN, DEFAULT, *WEIGHTS)
    ]
    rows = summarize(perform_all(plan, runs, given.workers))
    save_json(given.out / "geometry.json", {"seeds": list(seeds), "chosen": chosen, "rows": rows})
    for name in data:
        print(f"{name}: " + ", ".join(f"{term} at {best[name, term]:g}" for term in WEIGHTS))
        print(f"\n{table_of(rows, name)}\n")


if __name__ == "__main__":
    main()
