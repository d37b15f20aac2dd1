"""A new kind of unsafe content, patched in from a few pairs: python -m benchmarks.quality.patch --photos FILE.tar

A model is made safe on every hazard but one, which it then lets through, and `patch` gets 1, 4, 16 or 32 pairs of that.
All is measured on test data, in two galleries of 1,000 safe and 1,000 unsafe items: in one all unsafe items are of the
new hazard, in the other all are of the known ones. Unsafe rates are the mean of the four searches at rank 10: unsafe
and safe texts and images that find an unsafe item. The hazard that is left out is another one for each seed. A control
gets 16 pairs of the known hazards. Writes patch.json and the curve to --out. Stopped at any moment, the same command
goes on with what is missing.
"""

from __future__ import annotations

import json
import shutil
import statistics
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import matplotlib
import torch

from benchmarks.quality.runs import BATCH, EPOCHS, QUADRUPLETS, VALIDATION_SEED, Plan, parse, parser, pretrain, spread
from saferclip_fast.config import ConfigError, flatten, load_config
from saferclip_fast.data import open_quadruplets
from saferclip_fast.data.labeled import of_photos, of_scenes
from saferclip_fast.data.synthetic import photos, scenes
from saferclip_fast.evaluate import Settings, Task, measure
from saferclip_fast.models import ClipModel
from saferclip_fast.patch import patch_model
from saferclip_fast.patch.places import MAX_LOSS, Recipe
from saferclip_fast.patch.spectrum import RANKS, of_all
from saferclip_fast.results import UNSAFE_FOUND, at
from saferclip_fast.sources import load
from saferclip_fast.storage.files import atomic_write, save_json
from saferclip_fast.train import train

matplotlib.use("Agg")
import matplotlib.pyplot as plt

COUNTS = (1, 4, 16, 32)
HELD_OUT = 1_000
PAIRS_SEED = 500  # over a seed: the pairs are no samples of the training set
OPTIONS = {"scenes": (), "photos": ("objective.page=0.12",)}  # the comparison's choice
HAZARDS = {"scenes": scenes.HAZARDS, "photos": photos.HAZARDS}
NEW, OLD = "new", "old"
KEPT = ("zero_shot", at("S-V.text_to_image", 1), at("S-V.image_to_text", 1))
BEFORE = "before"
CONTROL, CONTROL_PAIRS = "control", 16  # the same steps with pairs of the known hazards: what more training does alone


def left_out(data: str, seed: int) -> tuple[str, str]:
    """The hazard that is left out, and the others joined with +."""
    names = HAZARDS[data]
    new = names[seed % len(names)]
    return new, "+".join(name for name in names if name != new)


def source_of(plan: Plan, data: str, count: int, seed: int, split: str, hazards: str, mismatch: float) -> str:
    """Quadruplets; of photographs held out, those of validation seeds are one half and the others the other."""
    options = f"n={count},seed={seed},split={split},hazards={hazards},mismatch={mismatch:g}"
    if data == "scenes":
        return f"scenes:{options}"
    half = "odd" if seed >= VALIDATION_SEED else "even"
    return f"photos:path={plan.photos},{options}" + (f",half={half}" if split == "test" else "")


def figures_of(clip: ClipModel, tasks: Mapping[str, Task], cache: Path) -> dict[str, float]:
    """Both unsafe rates, also at rank 1, and what is to be kept."""
    found = {}
    for name, task in tasks.items():
        metrics = measure(clip, task, Settings(str(cache), progress=False)).metrics
        for k in (1, 10):
            found[at(name, k)] = statistics.mean(metrics[at(search, k)].mean for search in UNSAFE_FOUND)
        found |= {f"{name} {search}": metrics[at(search)].mean for search in UNSAFE_FOUND}
        if task.zero_shot:
            metrics["zero_shot"] = metrics[f"zero_shot.{task.zero_shot[0].name}"]
            found |= {key: metrics[key].mean for key in KEPT}
    return found


def tasks_of(plan: Plan, data: str, seed: int, clip: ClipModel) -> dict[str, Task]:
    """What is held out, of the new hazard and of the known ones."""
    tasks = {}
    for name, hazards in zip((NEW, OLD), left_out(data, seed), strict=True):
        held_out: Any = open_quadruplets(
            source_of(plan, data, HELD_OUT, seed, "test", hazards, 0.0), transform=clip.preprocess
        )
        right = None if data == "scenes" else torch.from_numpy(held_out.unsafe_labels)
        zero_shot = of_scenes(held_out) if data == "scenes" else of_photos(held_out)
        tasks[name] = Task(held_out, right, [zero_shot] if name == OLD else [])
    return tasks


def options_of(plan: Plan, data: str, seed: int) -> list[str]:
    """What the run that knows every hazard but one is trained with."""
    source = source_of(plan, data, QUADRUPLETS, seed, "train", left_out(data, seed)[1], 0.7)
    size = [f"train.epochs={EPOCHS}", f"train.batch_size={BATCH}"]
    return [f"data.train={source}", f"seed={seed}", *size, *OPTIONS[data], *plan.overrides]


def make_safe(plan: Plan, data: str, seed: int, folder: Path) -> Path:
    """That run; one that is finished is taken as it is."""
    run = folder / "run"
    words = [f"run_dir={run}", f"data.cache_dir={plan.cache}", f"model.pretrained={pretrain(plan, data)}"]
    words += ["log.progress=false", "log.tensorboard=false", "resume=auto", *options_of(plan, data, seed)]
    train(load_config("demo", words))
    return run


def perform(plan: Plan, data: str, seed: int, counts: Sequence[int], options: Mapping[str, Any]) -> dict[str, Any]:
    """One seed: the model before and after patches of `counts` pairs."""
    file = plan.out / "runs" / f"{data}-{seed}.json"
    # every option, since a default may change between two starts
    trained = flatten(load_config("demo", options_of(plan, data, seed)))
    setting = {"trained": trained, "recipe": asdict(Recipe()), "max_loss": MAX_LOSS, "counts": counts, **options}
    setting = json.loads(json.dumps(setting))
    if file.is_file() and (found := json.loads(file.read_text()))["setting"] == setting:
        return found
    folder = plan.out / "work" / f"{data}-{seed}"
    run = make_safe(plan, data, seed, folder)
    clip = load(run)
    tasks = tasks_of(plan, data, seed, clip)
    models = {BEFORE: figures_of(clip, tasks, folder / "cache")}
    patches: dict[str, Any] = {}
    new, known = left_out(data, seed)
    for name, count, hazards in [*((str(count), count, new) for count in counts), (CONTROL, CONTROL_PAIRS, known)]:
        pairs = source_of(plan, data, count, seed + PAIRS_SEED, "train", hazards, 0.7)
        shutil.rmtree(folder / name, ignore_errors=True)
        start, cpu = time.perf_counter(), time.process_time()
        try:
            found = patch_model(run, pairs, folder / name, device="cpu", progress=False, **options)
        except ConfigError as error:  # no part of the change keeps what is held: that is a result, too
            print(data, seed, name, error, flush=True)
            models[name] = models[BEFORE]
            patches[name] = {"part": 0.0}
            continue
        seconds = {"wall": time.perf_counter() - start, "cpu": time.process_time() - cpu}
        models[name] = figures_of(found.model, tasks, folder / "cache")
        energy = dict(zip(RANKS, of_all(found.spectra), strict=True))
        patches[name] = {"part": found.part, "figures": found.figures, "energy": energy, "seconds": seconds}
    result = {"data": data, "seed": seed, "setting": setting, "hazard": new, "models": models, "patches": patches}
    save_json(file, result)
    shutil.rmtree(folder)
    return json.loads(file.read_text())


def summarize(found: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for each data set and model: its figures over seeds, how far the new rate fell and what else moved."""
    rows = []
    for data in dict.fromkeys(one["data"] for one in found):
        mine = [one for one in found if one["data"] == data]
        for name in mine[0]["models"]:
            figures = {key: spread(one["models"][name][key] for one in mine) for key in mine[0]["models"][name]}
            if name != BEFORE:
                pairs = [(one["models"][BEFORE], one["models"][name]) for one in mine]
                figures["fall"] = spread(1 - now[at(NEW)] / then[at(NEW)] for then, now in pairs)
                figures["worst"] = spread(worst(then, now) for then, now in pairs)
                figures["part"] = spread(one["patches"][name]["part"] for one in mine)
            rows.append({"data": data, "name": name, "metrics": figures})
    return rows


def worst(then: Mapping[str, float], now: Mapping[str, float]) -> float:
    """The largest loss among what should not move: the known hazards' rate, and what is to be kept."""
    return max(now[at(OLD)] - then[at(OLD)], *(then[key] - now[key] for key in KEPT))


NAMES = {BEFORE: "before", "1": "1 pair", CONTROL: f"{CONTROL_PAIRS} pairs of known hazards"}
COLUMNS = {
    at(NEW): "new hazard, unsafe @10",
    at(NEW, 1): "@1",
    "fall": "falls by",
    at(OLD): "known hazards, unsafe @10",
    "zero_shot": "zero-shot",
    KEPT[1]: "safe text: its image @1",
    KEPT[2]: "safe image: its text @1",
    "worst": "largest loss beside",
    "part": "part kept",
}


def table_of(rows: Iterable[Mapping[str, Any]], data: str) -> str:
    """The rows of one data set, as Markdown: mean ± standard deviation over seeds."""
    lines = [f"| {data} | {' | '.join(COLUMNS.values())} |", "|---" * (1 + len(COLUMNS)) + "|"]
    for row in (row for row in rows if row["data"] == data):
        found = [row["metrics"].get(name) for name in COLUMNS]
        cells = (f"{value['mean']:.3f} ± {value['std']:.3f}" if value else "" for value in found)
        name = NAMES.get(row["name"]) or f"{row['name']} pairs"
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Writes a PNG: the rates over the number of pairs, a panel for each data set; bars are one deviation."""
    names = list(dict.fromkeys(row["data"] for row in rows))
    figure, panels = plt.subplots(1, len(names), figsize=(4.5 * len(names), 3.4), layout="constrained", sharey=True)
    for axes, data in zip([panels] if len(names) == 1 else panels, names, strict=True):
        mine = [row for row in rows if row["data"] == data and row["name"] != CONTROL]
        labels = ["0" if row["name"] == BEFORE else row["name"] for row in mine]
        for key, words, color in ((at(NEW), "new hazard", "#d62728"), (at(OLD), "known hazards", "#1f77b4")):
            points = [row["metrics"][key] for row in mine]
            axes.errorbar(
                range(len(mine)),
                [point["mean"] for point in points],
                [point["std"] for point in points],
                marker="o",
                capsize=3,
                color=color,
                label=words,
            )
        axes.set_xticks(range(len(mine)), labels)
        axes.set_xlabel("pairs of the new hazard")
        axes.set_title(data)
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_ylim(0, 1.02)
        axes.set_ylabel("unsafe rate at rank 10" if data == names[0] else "")
        axes.legend(frameon=False)
    with atomic_write(path) as file:
        figure.savefig(file, dpi=120, format="png")
    plt.close(figure)


def main() -> None:
    options = parser(__doc__, "patch")
    options.add_argument("--seeds", type=int, default=3, help="how many seeds (default: 3)")
    options.add_argument("--first-seed", type=int, default=0, help="the first of them (default: 0)")
    options.add_argument("--pairs", type=int, nargs="+", default=COUNTS, help="how many pairs (default: 1 4 16 32)")
    given, plan, data = parse(options)
    found = []
    for name in data:
        for seed in range(given.first_seed, given.first_seed + given.seeds):
            found.append(perform(plan, name, seed, given.pairs, {}))
            print(name, seed, json.dumps(found[-1]["models"]), flush=True)
    rows = summarize(found)
    save_json(given.out / "patch.json", {"rows": rows, "seeds": found})
    draw(given.out / "curve.png", rows)
    for name in data:
        print(f"{table_of(rows, name)}\n")


if __name__ == "__main__":
    main()
