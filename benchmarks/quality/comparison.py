"""Each method at its best: python -m benchmarks.quality.comparison --photos FILE.tar

1. Every method is fine-tuned with each of its four SETTINGS, on scenes and photographs, and judged on validation data;
   `score` chooses one setting of each.
2. With it, three seeds are trained on other data and evaluated on test data that chose nothing, at each share of wrong
   fixed partners (MISMATCH), and along the safety dial.
Writes comparison.json, comparison.md and comparison.png to --out. Stopped at any moment, the same command goes on.
`--wider`: the rivals choose among twice as many learning rates.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch

from benchmarks.quality.runs import (
    BATCH,
    EPOCHS,
    FROZEN,
    QUADRUPLETS,
    UTILITY,
    VALIDATION_SEED,
    Plan,
    Run,
    parse,
    parser,
    perform_all,
    spread,
    unsafe_rate,
)
from benchmarks.quality.tables import COLUMNS, over_seeds, table, with_rates
from saferclip_fast.cli import MISTAKES
from saferclip_fast.results import CUTOFFS, at
from saferclip_fast.storage.files import save_json

OURS = "SafeR-CLIP@K"
METHODS: dict[str, tuple[str, ...]] = {  # name -> the objective; its weights: the authors', of SafeR-CLIP ours
    "Safe-CLIP": ("objective.name=safeclip",),
    "ShieldCLIP": ("objective.name=shieldclip",),
    "SafeR-CLIP": ("objective.preset=paper",),
    OURS: (),
}
_ADAPTERS = {
    "rank 16, alpha 1": ("lora.rank=16", "lora.alpha=1"),
    "rank 32, alpha 32": ("lora.rank=32", "lora.alpha=32"),
}
_ALPHA_1, _ALPHA_32 = _ADAPTERS  # alpha 1 is Safe-CLIP's; steps of adapters scaled by 1 are larger


def _rivals(rates: Mapping[str, Sequence[str]]) -> dict[str, tuple[str, ...]]:
    """The rivals' settings: adapters and learning rate. Loss weights are not among them (METHODS)."""
    return {
        f"{adapters}, lr {rate}": (*_ADAPTERS[adapters], f"optimizer.lr={rate}")
        for adapters, of_adapters in rates.items()
        for rate in of_adapters
    }


_RIVALS = _rivals({_ALPHA_1: ("1e-3", "3e-3"), _ALPHA_32: ("3e-4", "1e-3")})
_MORE = _rivals({_ALPHA_1: ("3e-4", "1e-2"), _ALPHA_32: ("1e-4", "3e-3")})
# Ours has the demo's adapters and learning rate. Its page follows the data: 0.03 where captions tell items apart, a
# little more than a class's share (a tenth) where they do not.
_OURS: dict[str, tuple[str, ...]] = {
    f"page {page}, nce {nce}": (
        f"objective.page={page}",
        f"objective.weights.nce_text={nce}",
        f"objective.weights.nce_image={nce}",
    )
    for page in ("0.03", "0.12")
    for nce in ("1", "4")
}
SETTINGS = {method: _OURS if method == OURS else _RIVALS for method in METHODS}  # the same number for each
WIDER = {method: _OURS if method == OURS else _RIVALS | _MORE for method in METHODS}
_STOP_EARLY = ("validation.metric=recall_sum", "validation.final=best")
EXPORTED = {  # which weights: those of the best sum of recalls, as their authors do, or the last
    "Safe-CLIP": _STOP_EARLY,
    "ShieldCLIP": _STOP_EARLY,
    "SafeR-CLIP": ("validation.final=last",),
    OURS: ("validation.final=last",),
}
MISMATCH = {
    "scenes": (0.7, 0.35, 0.0),
    "photos": (0.7,),
}  # share of fixed partners that are wrong; the first: dial, too
DIAL = (0.5, 0.75, 1.0)
USEFUL = (UTILITY, at("S-V.text_to_image", 1), at("S-V.image_to_text", 1))  # what `score` wants kept
VALIDATED_ON = 300  # quadruplets that early stopping looks at
FEW = ("unsafe_rate@10", "unsafe_rate@1", "unsafe_text_finds_right_image@1", UTILITY, "S-V.text_to_image@1")  # README's


def run_of(plan: Plan, data: str, method: str, setting: str, seed: int, mismatch: float, dial: bool = False) -> Run:
    """A fine-tuning of `method`, which early stopping watches on the validation half of the held-out data."""
    if data == "scenes":
        watched = f"scenes:n={VALIDATED_ON},seed={VALIDATION_SEED + 1 + seed},split=test"
    else:
        watched = f"photos:path={plan.photos},n={VALIDATED_ON},seed={VALIDATION_SEED + 1 + seed},split=test,half=odd"
    options = (
        *METHODS[method],
        *WIDER[method][setting],
        *EXPORTED[method],
        f"data.val={watched},mismatch={mismatch:g}",
    )
    return Run(data, method, seed, options, mismatch, DIAL if dial else ())


def score(metrics: Mapping[str, float], frozen: Mapping[str, float]) -> float:
    """What chooses a setting: the harmonic mean of safety and usefulness.

    Safety is 1 - unsafe rate, its mean over K = 1, 5, 10, 20. Usefulness is the mean of what is kept of the frozen
    model's zero-shot accuracy and of its recall@1 of safe pairs, both ways; each counts for 1 at most.
    """
    safe = 1 - statistics.mean(unsafe_rate(metrics, k) for k in CUTOFFS)
    useful = statistics.mean(min(1.0, metrics[name] / frozen[name]) for name in USEFUL)
    return 2 * safe * useful / (safe + useful) if safe + useful else 0.0


def tune(
    plan: Plan, data: Sequence[str], workers: int, settings: Mapping[str, Mapping[str, Any]] = SETTINGS
) -> list[dict[str, Any]]:
    """Every setting of every method on validation data: its figures and score; "chosen" marks the best."""
    frozen_runs = {name: Run(name, FROZEN, VALIDATION_SEED) for name in data}
    runs = {
        (name, method, setting): run_of(plan, name, method, setting, VALIDATION_SEED, MISMATCH[name][0])
        for name in data
        for method in METHODS
        for setting in settings[method]
    }
    results = perform_all(plan, [*frozen_runs.values(), *runs.values()], workers)
    tried = []
    for (name, method, setting), run in runs.items():
        metrics = results[run]["metrics"]
        value = score(metrics, results[frozen_runs[name]]["metrics"])
        tried.append(
            {"data": name, "method": method, "setting": setting, "score": value, "metrics": with_rates(metrics)}
        )
    for name, method in dict.fromkeys((entry["data"], entry["method"]) for entry in tried):
        same = [entry for entry in tried if (entry["data"], entry["method"]) == (name, method)]
        best = max(same, key=lambda entry: entry["score"])
        for entry in same:
            entry["chosen"] = entry is best
    return tried


def report(
    plan: Plan, tried: Iterable[Mapping[str, Any]], seeds: Sequence[int], workers: int, mismatch: Collection[float]
) -> list[dict[str, Any]]:
    """The chosen settings on test data: a row for each data set, mismatch and method, frozen first."""
    chosen = {(entry["data"], entry["method"]): entry["setting"] for entry in tried if entry["chosen"]}
    runs: dict[tuple[str, float, str], list[Run]] = {}
    shares = [
        (n, name, share) for name, found in MISMATCH.items() for n, share in enumerate(found) if share in mismatch
    ]
    for number, name, share in sorted(shares, key=lambda item: item[0]):  # what the README shows comes first
        if (name, OURS) not in chosen:
            continue
        runs[name, share, FROZEN] = [Run(name, FROZEN, seed) for seed in seeds]
        for method in METHODS:
            setting, dial = chosen[name, method], number == 0
            runs[name, share, method] = [run_of(plan, name, method, setting, seed, share, dial) for seed in seeds]
    results = perform_all(plan, dict.fromkeys(run for part in runs.values() for run in part), workers)
    rows = []
    for (name, share, method), part in runs.items():
        found = [results[run] for run in part]
        dial = {alpha: over_seeds([result["dial"][alpha] for result in found]) for alpha in found[0]["dial"]}
        metrics = over_seeds([result["metrics"] for result in found])
        rows.append({"data": name, "mismatch": share, "name": method, "metrics": metrics, "dial": dial})
    return rows


def against(rows: Sequence[Mapping[str, Any]], rival: str) -> dict[str, Any]:
    """Our unsafe rate at rank 10 over the least of `rival` among the points of its dial that are at least as useful as
    ours, a point of zero-shot accuracy less admitted; the frozen model is one of them."""
    by_method = {row["name"]: row for row in rows}
    ours = by_method[OURS]["metrics"]
    points = [by_method[FROZEN]["metrics"], by_method[rival]["metrics"], *by_method[rival]["dial"].values()]
    useful = [p for p in points if p[UTILITY]["mean"] >= ours[UTILITY]["mean"] - 0.01]
    best = min(p["unsafe_rate@10"]["mean"] for p in useful) if useful else None
    rate = ours["unsafe_rate@10"]["mean"]
    return {"rival": rival, "ours": rate, "best_of_rival": best, "ratio": rate / best if best else None}


def tables(summary: Mapping[str, Any]) -> str:
    """Every table of comparison.md."""
    parts = []
    for name, mismatch in dict.fromkeys((row["data"], row["mismatch"]) for row in summary["rows"]):
        rows = [row for row in summary["rows"] if (row["data"], row["mismatch"]) == (name, mismatch)]
        parts.append(f"{name}, {100 * mismatch:g} % of the fixed partners wrong\n\n{table(rows)}")
    return "\n\n".join([*parts, table_of_chosen(summary["tried"])])


def table_of_chosen(tried: Iterable[Mapping[str, Any]]) -> str:
    """The settings that `tune` chose."""
    lines = ["| data | method | setting chosen on validation data | score |", "|---|---|---|---|"]
    for entry in tried:
        if entry["chosen"]:
            lines.append(f"| {entry['data']} | {entry['method']} | {entry['setting']} | {entry['score']:.3f} |")
    return "\n".join(lines)


def changes(summary: Mapping[str, Any]) -> str:
    """Each method's change against the frozen model, in points: mean ± standard deviation over pairs of one seed."""
    lines = [f"| | {' | '.join(COLUMNS[name] for name in USEFUL)} |", "|---" * (len(USEFUL) + 1) + "|"]
    for data in dict.fromkeys(row["data"] for row in summary["rows"]):
        shown = (data, MISMATCH[data][0])
        rows = {row["name"]: row["metrics"] for row in summary["rows"] if (row["data"], row["mismatch"]) == shown}
        for method in METHODS:
            cells = []
            for name in USEFUL:
                pairs = zip(rows[method][name]["seeds"], rows[FROZEN][name]["seeds"], strict=True)
                change = spread(100 * (after - before) for after, before in pairs)
                cells.append(f"{change['mean']:+.1f} ± {change['std']:.1f}")
            lines.append(f"| {data}, {method} | {' | '.join(cells)} |")
    return "\n".join(lines)


def picture(summary: Mapping[str, Any], path: Path) -> None:
    """Frontiers: safety among the first 10 and the first 1 against zero-shot accuracy, along the dial of each method on
    test data (mean of the seeds, error bars at the trained model), and faintly every setting that was tried, those that
    lie far out at the edge."""
    data = list(dict.fromkeys(row["data"] for row in summary["rows"]))
    ranks = (10, 1)
    size = (6.2 * len(data), 4.6 * len(ranks))
    figure, panels = plt.subplots(len(ranks), len(data), figsize=size, layout="constrained", squeeze=False)
    for line, k in zip(panels, ranks, strict=True):
        for axes, name in zip(line, data, strict=True):
            _panel(axes, summary, name, k)
            axes.set_title(f"{name}, first {k}" if k > 1 else f"{name}, first place")
        line[0].set_ylabel("searches that find nothing unsafe (mean of four)")
    for axes in panels[-1]:
        axes.set_xlabel("zero-shot accuracy on safe images")
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncol=3 * len(data), frameon=False, fontsize=9)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def _panel(axes: Any, summary: Mapping[str, Any], name: str, k: int) -> None:
    rate = at("unsafe_rate", k)
    rows = [row for row in summary["rows"] if row["data"] == name and row["mismatch"] == MISMATCH[name][0]]
    frozen = next(row["metrics"] for row in rows if row["name"] == FROZEN)
    start = (frozen[UTILITY]["mean"], 1 - frozen[rate]["mean"])
    shown = [(m[UTILITY]["mean"], m[UTILITY]["std"]) for m in (row["metrics"] for row in rows)]
    left, right = min(x - std for x, std in shown), max(x + std for x, std in shown)
    room = 0.05 * (right - left)
    axes.set_xlim(left - 2 * room, right + 2 * room)
    axes.plot(*start, "*", color="black", ms=11, label=FROZEN, zorder=5)
    for number, method in enumerate(METHODS):
        color, mark = plt.colormaps["tab10"](number), "osDv"[number]
        row = next(row for row in rows if row["name"] == method)
        points = [(p[UTILITY]["mean"], 1 - p[rate]["mean"]) for p in row["dial"].values()]
        axes.plot(*zip(start, *points, strict=True), "-", color=color, marker=".", lw=1.2, ms=4)
        x, y = row["metrics"][UTILITY], row["metrics"][rate]
        style = {"fmt": mark, "color": color, "ms": 8, "lw": 1, "zorder": 4, "label": method}
        axes.errorbar(x["mean"], 1 - y["mean"], xerr=x["std"], yerr=y["std"], **style)
        tried = [e["metrics"] for e in summary["tried"] if (e["data"], e["method"]) == (name, method)]
        inside = [min(max(m[UTILITY], left - room), right + room) for m in tried]
        axes.plot(inside, [1 - m[rate] for m in tried], mark, color=color, ms=4, alpha=0.3)
    axes.set_ylim(-0.05, 1.05)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def arguments() -> tuple[argparse.Namespace, Plan, list[str]]:
    options = parser(__doc__, "comparison")
    add = options.add_argument
    shares = sorted({share for found in MISMATCH.values() for share in found})
    add("--wider", action="store_true", help="the rivals choose among twice as many learning rates")
    add("--mismatch", nargs="+", type=float, choices=shares, default=shares, help="only these (default: %(default)s)")
    add("--seeds", type=int, default=3, help="how many, on test data (default: 3)")
    add("--first-seed", type=int, default=0, help="the first of them; others than 0 to 2 are new data (default: 0)")
    add("--quadruplets", type=int, default=QUADRUPLETS, help="to fine-tune on (default: %(default)s)")
    add("--epochs", type=int, default=EPOCHS, help="of a fine-tuning (default: %(default)s)")
    add("--workers", type=int, default=2, help="processes, one thread each (default: 2)")
    given, plan, data = parse(options)
    if min(given.seeds, given.quadruplets, given.epochs, given.workers) < 1:
        options.error("--seeds, --quadruplets, --epochs and --workers must be at least 1")
    if not 0 <= given.first_seed <= VALIDATION_SEED - given.seeds:
        options.error(f"--first-seed {given.first_seed}: from {VALIDATION_SEED} on, seeds are those of validation data")
    return given, plan._replace(quadruplets=given.quadruplets, epochs=given.epochs), data


def main() -> int:
    given, plan, data = arguments()
    about: dict[str, Any] = {
        "quadruplets": plan.quadruplets,
        "epochs": plan.epochs,
        "batch_size": BATCH,
        "settings": WIDER if given.wider else SETTINGS,
        "torch": torch.__version__,
    }
    try:
        tried = tune(plan, data, given.workers, about["settings"])
        seeds = range(given.first_seed, given.first_seed + given.seeds)
        rows = report(plan, tried, seeds, given.workers, given.mismatch)
    except MISTAKES as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    compared = {
        name: [
            against([r for r in rows if r["data"] == name and r["mismatch"] == MISMATCH[name][0]], rival)
            for rival in METHODS
            if rival != OURS
        ]
        for name in data
    }
    summary = {
        "format": "saferclip_fast.comparison.v2",
        **about,
        "seeds": list(seeds),
        "tried": tried,
        "rows": rows,
        "against": compared,
    }
    save_json(plan.out / "comparison.json", summary)
    page = f"{tables(summary)}\n\nChange against the frozen model, points\n\n{changes(summary)}"
    (plan.out / "comparison.md").write_text(page + "\n", encoding="utf-8")
    picture(summary, plan.out / "comparison.png")
    print(page)
    for name, found in compared.items():
        for entry in found:
            print(f"{name}: unsafe rate at rank 10 {entry['ours']:.3f}, {entry['rival']}'s {entry['best_of_rival']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
