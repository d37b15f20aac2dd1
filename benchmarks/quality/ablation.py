"""The value of each part of the objective: python -m benchmarks.quality.ablation --photos FILE.tar

Fine-tunes a small CLIP with every variant of the objective, several seeds each, on synthetic scenes and on photographs,
and evaluates it on held-out samples. Writes ablation.md (mean and standard deviation over seeds), ablation.json and
ablation.png to --out. A seed is that of the data, of the held-out samples and of the training; the pre-trained model is
the same for all (made once, cached). Stopped at any moment, the same command goes on with what is missing.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Mapping, Sequence
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
    Plan,
    Run,
    job_of,
    perform_all,
    pretrain,
    source_of,
    spread,
)
from benchmarks.quality.tables import over_seeds, table
from saferclip_fast import nearest_safe
from saferclip_fast.cli import MISTAKES
from saferclip_fast.config import load_config
from saferclip_fast.data import open_quadruplets
from saferclip_fast.embeddings import embed_quadruplets
from saferclip_fast.models import load_clip
from saferclip_fast.results import PAGE, at
from saferclip_fast.storage.files import save_json

# Name in the tables -> training options over the demo's. Safe-CLIP, then one thing more with each "+". All have
# the demo's adapters and learning rate: a row shows its objective. comparison.py gives each method its own best.
VARIANTS: dict[str, tuple[str, ...]] = {
    "Safe-CLIP": ("objective.name=safeclip",),
    "+ nearest targets": ("objective.name=safeclip", "objective.targets=nearest"),
    "+ relative loss": ("objective.preset=paper", "curriculum.enabled=false"),
    "+ curriculum = SafeR-CLIP": ("objective.preset=paper",),
    "SafeR-CLIP, moving negative": ("objective.preset=paper", "objective.negative=current"),
    "ShieldCLIP": ("objective.name=shieldclip",),
    "default": (),
    "default, no rank guard": ("objective.weights.rank_guard=0",),
    "default, k 1": ("objective.k=1",),
    "default, k 4": ("objective.k=4",),
}
DRIFT = ("safe_text_cosine_to_frozen", "safe_image_cosine_to_frozen")
SAFETY = {f"{kind}_queries@{PAGE}": f"{kind} inputs, nothing unsafe in the first {PAGE}" for kind in ("unsafe", "safe")}


def run_of(data: str, variant: str, seed: int) -> Run:
    """A fine-tuning, or for FROZEN the evaluation of the frozen model."""
    return Run(data, variant, seed, VARIANTS.get(variant, ()))


def right_targets(plan: Plan, data: str, seed: int) -> dict[str, float]:
    """Share of the unsafe samples whose target is right (all attributes of the scene, or the photograph's class): of
    their fixed partner, and of the safe text nearest to theirs."""
    run = Run(data, FROZEN, seed)
    clip = load_clip(load_config(job_of(plan, run).config).model.name, str(pretrain(plan, data)))
    dataset: Any = open_quadruplets(source_of(plan, run), transform=clip.preprocess)
    rows = embed_quadruplets(clip, dataset, plan.cache, progress=False).embeddings  # cached by the runs
    nearest = nearest_safe(rows.unsafe_text, torch.nn.functional.normalize(rows.safe_text, dim=-1)).indices[:, 0]
    if data == "scenes":
        safe, unsafe = dataset.safe.codes, dataset.unsafe.codes
    else:
        safe, unsafe = dataset.safe_labels[:, None], dataset.unsafe_labels[:, None]
    return {
        name: float((targets == unsafe).all(1).mean())
        for name, targets in (("pair", safe), ("nearest", safe[nearest.numpy()]))
    }


def safety(metrics: Mapping[str, float], queries: str) -> float:
    """The share of "unsafe_queries@10" or "safe_queries@10" that find no unsafe item, mean of both directions."""
    kind = queries.partition("_")[0]
    return 1 - statistics.mean(
        metrics[at(f"{kind}_{a}_finds_unsafe_{b}")] for a, b in (("text", "image"), ("image", "text"))
    )


def summarize(results: Mapping[Run, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One row for each data set and variant: mean and standard deviation over the seeds of every metric."""
    rows = []
    for data, variant in dict.fromkeys((run.data, run.name) for run in results):
        found = [results[run]["metrics"] for run in results if run[:2] == (data, variant)]
        metrics = over_seeds(found) | {name: spread(metrics[name] for metrics in found) for name in DRIFT}
        metrics |= {name: spread(safety(metrics, name) for metrics in found) for name in SAFETY}
        options = list(VARIANTS.get(variant, ()))
        rows.append({"data": data, "name": variant, "options": options, "metrics": metrics})
    return rows


def tables(rows: list[dict[str, Any]]) -> str:
    """One Markdown table for each data set."""
    return "\n\n".join(
        f"{data}\n\n{table(row for row in rows if row['data'] == data)}"
        for data in dict.fromkeys(r["data"] for r in rows)
    )


def picture(rows: list[dict[str, Any]], path: Path) -> None:
    """Safety against utility, a column of panels for each data set, error bars of one standard deviation over the
    seeds: above what unsafe inputs find, below what safe ones find."""
    data = list(dict.fromkeys(row["data"] for row in rows))
    size = (6.4 * len(data), 4.6 * len(SAFETY))
    figure, panels = plt.subplots(len(SAFETY), len(data), figsize=size, layout="constrained", squeeze=False)
    for line, (kind, words) in zip(panels, SAFETY.items(), strict=True):
        for axes, name in zip(line, data, strict=True):
            _panel(axes, [row for row in rows if row["data"] == name], kind)
            axes.set_title(name)
        line[0].set_ylabel(f"safety: {words}")
    for axes in panels[-1]:
        axes.set_xlabel("zero-shot accuracy on safe images")
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncol=2 * len(data), frameon=False, fontsize=9)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def _panel(axes: Any, rows: list[dict[str, Any]], kind: str) -> None:
    """Every objective's safety `kind` against its utility; the frozen model as dashed lines.

    What lies far from the others is drawn at the edge, its value beside it: to scale, the others would be one blot.
    """
    low, high = bulk([row["metrics"][UTILITY]["mean"] for row in rows])
    for row in (row for row in rows if row["name"] != FROZEN):
        index = list(VARIANTS).index(row["name"])  # the same mark in every panel
        x, y = row["metrics"][UTILITY], row["metrics"][kind]
        style = {"fmt": "o^sDvP*X<>hp"[index % 12], "color": plt.colormaps["tab20"](index), "ms": 8, "lw": 1}
        style["zorder"] = 4 if row["name"] == "default" else 3
        shown = min(max(x["mean"], low), high)
        if shown == x["mean"]:
            style["xerr"] = x["std"]
        else:
            arrow = f"\N{LEFTWARDS ARROW} {x['mean']:.2f}" if shown == low else f"{x['mean']:.2f} \N{RIGHTWARDS ARROW}"
            place = {"xytext": (0, 7), "textcoords": "offset points", "ha": "left" if shown == low else "right"}
            axes.annotate(arrow, (shown, y["mean"]), fontsize=8, **place)
        axes.errorbar(shown, y["mean"], yerr=y["std"], label=row["name"], **style)
    frozen = next(row["metrics"] for row in rows if row["name"] == FROZEN)
    axes.axvline(frozen[UTILITY]["mean"], color="gray", ls="--", lw=1, label=FROZEN)
    axes.axhline(frozen[kind]["mean"], color="gray", ls="--", lw=1)
    axes.set_xlim(low - 0.05 * (high - low), high + 0.05 * (high - low))
    axes.set_ylim(-0.05, 1.05)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def bulk(values: Sequence[float]) -> tuple[float, float]:
    """The ends of an axis that shows all of `values` but those that lie far out: five typical distances and more."""
    middle = statistics.median(values)
    typical = max(statistics.median(abs(value - middle) for value in values), 0.01)
    near = [value for value in values if abs(value - middle) <= 5 * typical]
    return min(near) - typical, max(near) + typical


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--photos", type=Path, help="tar of train/CLASS/ and test/CLASS/ photographs; without: scenes only"
    )
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/ablation"), help="results (%(default)s)")
    parser.add_argument("--cache-dir", type=Path, default=Path(".cache/saferclip"), help="caches (%(default)s)")
    parser.add_argument("--seeds", type=int, default=3, help="seeds 0 to N - 1 (default: 3)")
    parser.add_argument("--quadruplets", type=int, default=QUADRUPLETS, help="to fine-tune on (default: %(default)s)")
    parser.add_argument("--epochs", type=int, default=EPOCHS, help="of a fine-tuning (default: %(default)s)")
    parser.add_argument("--only", nargs="+", choices=VARIANTS, metavar="NAME", help="these variants, default: all")
    parser.add_argument("--workers", type=int, default=2, help="processes, one thread each (default: 2)")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="training options over those of all variants")
    given = parser.parse_intermixed_args()
    if given.photos is not None and not given.photos.is_file():
        parser.error(
            f"--photos {given.photos}: no such file; pass a tar of train/CLASS/NAME and test/CLASS/NAME images"
        )
    if min(given.seeds, given.quadruplets, given.epochs, given.workers) < 1:
        parser.error("--seeds, --quadruplets, --epochs and --workers must be at least 1")
    return given


def write(plan: Plan, results: Mapping[Run, Mapping[str, Any]]) -> None:
    """ablation.json, ablation.md and ablation.png; prints the table and what the targets are worth."""
    rows = summarize(results)
    targets: dict[str, list[dict[str, float]]] = {}
    for data, seed in dict.fromkeys((run.data, run.seed) for run in results):
        targets.setdefault(data, []).append(right_targets(plan, data, seed))
    summary: dict[str, Any] = {
        "format": "saferclip_fast.ablation.v2",
        "quadruplets": plan.quadruplets,
        "epochs": plan.epochs,
        "batch_size": BATCH,
        "overrides": plan.overrides,
        "torch": torch.__version__,
        "seconds": {kind: sum(result["seconds"][kind] for result in results.values()) for kind in ("wall", "cpu")},
        "right_targets": targets,
        "rows": rows,
    }
    save_json(plan.out / "ablation.json", summary)
    (plan.out / "ablation.md").write_text(tables(rows) + "\n", encoding="utf-8")
    picture(rows, plan.out / "ablation.png")
    print(tables(rows))
    for data, found in targets.items():
        pair, nearest = (statistics.mean(shares[key] for shares in found) for key in ("pair", "nearest"))
        print(f"\n{data}: the fixed partner is right for {pair:.2f} of the samples, the nearest text for {nearest:.2f}")
    print(f"\n{len(results)} runs, {summary['seconds']['cpu']:.0f} CPU seconds; {plan.out}/ablation.json, .md, .png")


def main() -> int:
    given = arguments()
    plan = Plan(given.out, given.cache_dir, given.photos, given.quadruplets, given.epochs, tuple(given.overrides))
    data = ["scenes"] + (["photos"] if given.photos is not None else [])
    variants = [FROZEN, *(given.only or VARIANTS)]
    runs = [run_of(name, variant, seed) for name in data for seed in range(given.seeds) for variant in variants]
    try:
        write(plan, perform_all(plan, runs, given.workers))
    except MISTAKES as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
