"""DoRA and a start by Fisher information beside plain LoRA: python -m benchmarks.quality.adapters --photos FILE.tar

Each of the four at the best of two or three learning rates, chosen on validation data by the comparison's score at the
end of training. On test data: the figures at the end, and the steps to the unsafe rate that plain LoRA ends with, with
utility there, both from lines between checkpoints. Where DoRA's rate is another than LoRA's, LoRA runs at it, too. Runs
are short, three epochs at a constant rate, so that one run is read at any step. Writes adapters.json to --out. Stopped
at any moment, the same command goes on with what is missing.
"""

from __future__ import annotations

import itertools
import json
import re
import shutil
import tempfile
import time
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.quality.comparison import score
from benchmarks.quality.runs import (
    FROZEN,
    UTILITY,
    VALIDATION_SEED,
    Plan,
    Run,
    figures_of,
    fine_tuned,
    job_of,
    options_of,
    parse,
    parser,
    pretrain,
    spread,
    unsafe_rate,
)
from saferclip_fast.config import Config, flatten, load_config
from saferclip_fast.models import ClipModel, load_clip
from saferclip_fast.results import at
from saferclip_fast.storage.files import save_json
from saferclip_fast.train.checkpoint import CheckpointFolder, read_checkpoint
from saferclip_fast.train.trial import set_trainable

PLAIN, DORA = "LoRA", "DoRA"
VARIANTS = {
    PLAIN: (),
    DORA: ("lora.dora=true",),
    "LoRA, Fisher start": ("lora.init=fisher",),
    "DoRA, Fisher start": ("lora.dora=true", "lora.init=fisher"),
}
CONTROL = "LoRA at DoRA's rate"  # where the two were best at different ones
RATES = {"scenes": (3e-4, 1e-3, 3e-3), "photos": (1e-3, 3e-3)}  # on scenes the first was far from any safety
EPOCHS, EVERY = 3, 12  # 49 steps, with a checkpoint every 12
OPTIONS = {"scenes": (), "photos": ("objective.page=0.12",)}  # the comparison's choice
LENGTH = (
    f"train.epochs={EPOCHS}",
    "optimizer.schedule=constant",
    "data.val_fraction=0",
    f"checkpoint.every_steps={EVERY}",
    "checkpoint.keep=100",
)
RATE, RETRIEVAL = at("unsafe_rate"), at("S-V.text_to_image", 1)
USEFUL = (UTILITY, RETRIEVAL)
COLUMNS = {
    RATE: "unsafe, mean of four @10",
    UTILITY: "zero-shot",
    RETRIEVAL: "safe text: its image @1",
    "steps": "steps to LoRA's safety",
    f"{UTILITY} there": "zero-shot there",
    f"{RETRIEVAL} there": "safe text: its image @1 there",
    "seconds": "CPU seconds of training",
}


def run_of(data: str, name: str, seed: int, rate: float = 0) -> Run:
    options = () if name == FROZEN else (*OPTIONS[data], *LENGTH, f"optimizer.lr={rate:g}", *VARIANTS.get(name, ()))
    return Run(data, name, seed, options)


def perform(plan: Plan, run: Run, curve: bool) -> dict[str, Any]:
    """Fine-tunes (or reads a finished run back); its figures by step, of the last step alone without `curve`."""
    rate = next((word.partition("=")[2] for word in run.options if word.startswith("optimizer.lr=")), "")
    slug = re.sub(r"[^a-z0-9.]+", "-", f"{run.data}-{run.name}-{rate}-{run.seed}".lower())
    file = plan.out / "runs" / f"{slug}.json"
    job, options, weights = job_of(plan, run), options_of(plan, run), pretrain(plan, run.data)
    config = load_config(job.config, options)
    setting = json.loads(json.dumps({"options": flatten(config), "weights": weights.name, "curve": curve}))
    if file.is_file() and (found := json.loads(file.read_text()))["setting"] == setting:
        return found
    frozen = load_clip(config.model.name, str(weights))
    if run.name == FROZEN:
        points, seconds = {0: figures_of(plan, run, job, frozen, frozen)}, 0.0
    else:
        folder, start = file.with_suffix(""), time.process_time()
        last = fine_tuned(plan, job, options, weights, folder)
        seconds = time.process_time() - start
        paths = {
            int(path.stem.removeprefix("step-")): path for path in CheckpointFolder(folder / "checkpoints", 1).paths()
        }
        early = {step: path for step, path in paths.items() if curve and step % EVERY == 0 and step < max(paths) - 1}
        points = {
            step: figures_of(plan, run, job, frozen, model_at(config, weights, path)) for step, path in early.items()
        }
        points[max(paths)] = figures_of(plan, run, job, frozen, last)
        shutil.rmtree(folder)  # checkpoints and weights of a run that is done
    save_json(file, {"setting": setting, "points": points, "seconds": seconds})
    return json.loads(file.read_text())


def few(metrics: Mapping[str, float]) -> dict[str, float]:
    """What the table shows of all metrics."""
    return {RATE: unsafe_rate(metrics, 10)} | {name: metrics[name] for name in USEFUL}


def model_at(config: Config, weights: Path, checkpoint: Path) -> ClipModel:
    """The model that a checkpoint of the run holds, adapters merged."""
    clip = load_clip(config.model.name, str(weights))
    set_trainable(config, clip)
    own = clip.model.state_dict()
    with torch.no_grad():
        for name, value in read_checkpoint(checkpoint).tensors.items():
            if name.startswith("model."):
                own[name.removeprefix("model.")].copy_(value)
    with tempfile.TemporaryDirectory() as folder:
        return load_clip(config.model.name, str(clip.export(folder)))


def reached(points: Mapping[str, Mapping[str, float]], target: float) -> dict[str, float] | None:
    """Where the unsafe rate first is at most `target`, on lines between the points: steps, and the useful figures.

    `points` is by step, from step 0, the frozen model. None where no point is as safe.
    """
    steps = sorted(points, key=int)
    for before, after in itertools.pairwise(steps):
        high, low = points[before][RATE], points[after][RATE]
        if low <= target:
            share = (high - target) / (high - low) if high > target else 0.0
            there = {
                f"{name} there": points[before][name] + share * (points[after][name] - points[before][name])
                for name in USEFUL
            }
            return {"steps": int(before) + share * (int(after) - int(before)), **there}
    return None


def choose(plan: Plan, data: Sequence[str]) -> list[dict[str, Any]]:
    """Every rate of every variant on validation data: its score at the end; "chosen" marks the best one."""
    rows = []
    for name in data:
        frozen = perform(plan, run_of(name, FROZEN, VALIDATION_SEED), False)["points"]["0"]
        for variant in VARIANTS:
            tried = {}
            for rate in RATES[name]:
                points = perform(plan, run_of(name, variant, VALIDATION_SEED, rate), False)["points"]
                (tried[rate],) = points.values()
                print(name, variant, f"{rate:g}", few(tried[rate]), flush=True)
            scores = {rate: score(metrics, frozen) for rate, metrics in tried.items()}
            rows += [
                {"data": name, "name": variant, "lr": rate, "score": value, "chosen": value == max(scores.values())}
                | {"metrics": few(tried[rate])}
                for rate, value in scores.items()
            ]
    return rows


def summarize(found: Mapping[Run, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A row for each data set and variant: figures at the end, where plain LoRA's safety is reached, and by step."""
    shown = {run: {step: few(metrics) for step, metrics in one["points"].items()} for run, one in found.items()}
    frozen, plain = (
        {(run.data, run.seed): points for run, points in shown.items() if run.name == name} for name in (FROZEN, PLAIN)
    )
    rows = []
    for data, name in dict.fromkeys(run[:2] for run in found):
        mine = {run: points for run, points in shown.items() if run[:2] == (data, name)}
        ends = [points[max(points, key=int)] for points in mine.values()]
        figures: dict[str, Any] = {key: spread(end[key] for end in ends) for key in (RATE, *USEFUL)}
        row = {"data": data, "name": name, "options": next(iter(mine)).options, "metrics": figures}
        if name != FROZEN:
            curves = [frozen[data, run.seed] | points for run, points in mine.items()]
            ends = [plain[data, run.seed] for run in mine]
            targets = [points[max(points, key=int)][RATE] for points in ends]
            met = [reached(curve, target) for curve, target in zip(curves, targets, strict=True)]
            there = [one for one in met if one is not None]
            for key in there[0] if there else ():
                figures[key] = spread(one[key] for one in there)
            figures["seconds"] = spread(found[run]["seconds"] for run in mine)
            row["reached"] = len(there)
            row["points"] = {
                step: {key: spread(curve[step][key] for curve in curves) for key in (RATE, *USEFUL)}
                for step in curves[0]
            }
        rows.append(row)
    return rows


def table_of(rows: Iterable[Mapping[str, Any]], data: str) -> str:
    """The rows of one data set, as Markdown: mean ± standard deviation over the seeds that have the figure."""
    lines = [f"| {data} | {' | '.join(COLUMNS.values())} |", "|---" * (1 + len(COLUMNS)) + "|"]
    for row in (row for row in rows if row["data"] == data):
        cells = []
        for key in COLUMNS:
            figure = row["metrics"].get(key)
            digits = 1 if key in ("steps", "seconds") else 3
            cell = "" if figure is None else f"{figure['mean']:.{digits}f} ± {figure['std']:.{digits}f}"
            short = figure is not None and key == "steps" and row["reached"] < len(row["metrics"][RATE]["seeds"])
            cells.append(f"{cell} ({row['reached']} of {len(row['metrics'][RATE]['seeds'])} seeds)" if short else cell)
        rate = next((f", {word.partition('.')[2]}" for word in row["options"] if word.startswith("optimizer.lr=")), "")
        lines.append(f"| {row['name']}{rate.replace('=', ' ')} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    options = parser(__doc__, "adapters")
    options.add_argument("--seeds", type=int, default=3, help="how many seeds (default: 3)")
    options.add_argument("--first-seed", type=int, default=0, help="the first of them (default: 0)")
    given, plan, data = parse(options)
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message=".*random weights.*")
    seeds = range(given.first_seed, given.first_seed + given.seeds)
    chosen = choose(plan, data)
    best = {(row["data"], row["name"]): row["lr"] for row in chosen if row["chosen"]}
    found = {}
    for name in data:
        for seed in seeds:
            rates = {FROZEN: 0.0} | {variant: best[name, variant] for variant in VARIANTS}
            if rates[PLAIN] != rates[DORA]:
                rates[CONTROL] = rates[DORA]
            for variant, rate in rates.items():
                run = run_of(name, variant, seed, rate)
                found[run] = perform(plan, run, True)
                print(name, variant, seed, {step: few(m) for step, m in found[run]["points"].items()}, flush=True)
    rows = summarize(found)
    save_json(given.out / "adapters.json", {"seeds": list(seeds), "chosen": chosen, "rows": rows})
    for name in data:
        print(f"\n{table_of(rows, name)}\n")


if __name__ == "__main__":
    main()
