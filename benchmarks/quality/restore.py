"""Safety put back after a later fine-tuning: python -m benchmarks.quality.restore --photos FILE.tar

A safe model is fine-tuned, all weights of it, on own safe pairs of an image and a caption, with classes under new
names. That brings hazards back. `restore` chooses how much it adds on validation data, and all is measured on test
data: the mean unsafe rate at rank 10, and zero-shot accuracy under the new names. Writes restore.json to --out. Stopped
at any moment, the same command goes on with what is missing.
"""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from benchmarks.quality.runs import (
    BATCH,
    EPOCHS,
    QUADRUPLETS,
    VALIDATION_SEED,
    Plan,
    Run,
    job_of,
    parse,
    parser,
    pretrain,
    spread,
)
from saferclip_fast.config import ConfigError, load_config
from saferclip_fast.data.images import ImageArray
from saferclip_fast.data.labeled import LabeledImages
from saferclip_fast.data.synthetic import photos, scenes
from saferclip_fast.demo.pretrain import train_on_pairs
from saferclip_fast.evaluate import Settings, Task
from saferclip_fast.models import ClipModel, load_clip
from saferclip_fast.restore import restore_model
from saferclip_fast.restore.call import RATE, figures_of
from saferclip_fast.storage.files import save_json
from saferclip_fast.train import train

OWN_PAIRS, OWN_EPOCHS, OWN_LR = 3_000, 3, 5e-4
NEW_NAMES = ("apple", "book", "chair", "drum", "eagle", "ferry", "glove", "house", "island", "jacket")
OPTIONS = {"scenes": (), "photos": ("objective.page=0.12",)}  # the comparison's choice
THRESHOLDS = {"the paper's threshold, 0.35": 0.35, "every layer": 1.1}
OWN = "zero_shot.own"


def renamed(text: str, names: Sequence[str]) -> str:
    """`text` with the class it names under its new name."""
    for old, new in zip(names, NEW_NAMES, strict=False):
        text = text.replace(f"an {old}", f"a {old}").replace(old, new)
    return text


def own_pairs(plan: Plan, data: str, seed: int) -> tuple[np.ndarray, list[str], list[str]]:
    """Images, captions under the new names, and the old names."""
    if data == "scenes":
        names = scenes.class_names("shape")
        images, captions = scenes.pretrain_pairs(OWN_PAIRS, 100 + seed, unsafe_share=0.0)
    else:
        assert plan.photos is not None
        names = photos.load_photos(plan.photos, "test").class_names
        images, captions = photos.pretrain_photos(plan.photos, OWN_PAIRS, 100 + seed)
    return images, [renamed(caption, names) for caption in captions], names


def own_task(data: str, held_out: Any) -> LabeledImages:
    """The held-out safe images, classed under the new names."""
    images = [ImageArray(image, f"image {i}") for i, image in enumerate(held_out.right_images)]
    if data == "scenes":
        labels, count = (
            np.asarray(scenes.class_labels(held_out.right, "shape")).tolist(),
            len(scenes.class_names("shape")),
        )
        return LabeledImages.of("own", images, labels, NEW_NAMES[:count], scenes.PROMPTS)
    labels, count = held_out.unsafe_labels.tolist(), len(held_out.class_names)
    return LabeledImages.of("own", images, labels, [f"a {name}" for name in NEW_NAMES[:count]], photos.TEMPLATES)


def perform(plan: Plan, data: str, seed: int) -> dict[str, Any]:
    """One seed: a model made safe, fine-tuned on own pairs, restored with each threshold; figures on test data."""
    file = plan.out / "runs" / f"{data}-{seed}.json"
    if file.is_file():
        return json.loads(file.read_text())
    folder = plan.out / "work" / f"{data}-{seed}"
    shutil.rmtree(folder, ignore_errors=True)
    job, weights = job_of(plan, Run(data, "", seed)), pretrain(plan, data)
    words = [f"run_dir={folder / 'run'}", f"data.cache_dir={plan.cache}", f"model.pretrained={weights}", f"seed={seed}"]
    words += [f"data.train={job.source.replace('n=3000', f'n={QUADRUPLETS}')}", f"train.epochs={EPOCHS}"]
    words += [f"train.batch_size={BATCH}", "log.progress=false", "log.tensorboard=false", *OPTIONS[data]]
    result = train(load_config(job.config, words))
    safe = load_clip(load_config(job.config, words).model.name, str(result.weights))
    later = copy.deepcopy(safe)
    images, captions, _ = own_pairs(plan, data, seed)
    torch.manual_seed(seed)
    train_on_pairs(later, images, captions, OWN_EPOCHS, OWN_LR, progress=False)
    later.weights_hash = later.hash_weights()

    task = Task(job.held_out, job.right_labels, [job.zero_shot, own_task(data, job.held_out)])
    settings = Settings(str(folder / "cache"), seed=seed, progress=False)

    def on_test(clip: ClipModel) -> dict[str, float]:
        return figures_of(clip, task, settings, "test")

    models = {"safe": on_test(safe), "later": on_test(later)}
    source = f"scenes:n=500,seed={VALIDATION_SEED}" if data == "scenes" else f"photos:path={plan.photos},n=500,half=odd"
    chosen = {}
    words = [f"{source},split=test,mismatch=0"]
    for name, threshold in THRESHOLDS.items():
        given = {"threshold": threshold, "device": "cpu", "progress": False}
        try:
            found = restore_model(folder / "run", later, folder / f"{threshold:g}", *words, **given)
        except ConfigError:  # the whole safe change is not enough on validation data: what it gives all the same
            found = restore_model(folder / "run", later, folder / f"{threshold:g}", *words, add=1.0, **given)
        models[name] = on_test(found.model)
        chosen[name] = {"add": found.add, "layers": [layer._asdict() for layer in found.layers]}
    save_json(file, {"data": data, "seed": seed, "models": models, "restored": chosen})
    shutil.rmtree(folder)
    return json.loads(file.read_text())


def summarize(found: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for each data set and model: its figures, and how much of the rise and of the gain it has, over seeds."""
    rows = []
    for data in dict.fromkeys(one["data"] for one in found):
        mine = [one for one in found if one["data"] == data]
        for name in mine[0]["models"]:
            figures = {key: spread(one["models"][name][key] for one in mine) for key in mine[0]["models"][name]}
            if name in THRESHOLDS:
                figures["add"] = spread(one["restored"][name]["add"] for one in mine)
                for part, key in (("rise taken back", RATE), ("gain kept", OWN)):
                    shares = []
                    for one in mine:
                        safe, later, now = (one["models"][model][key] for model in ("safe", "later", name))
                        shares.append((later - now) / (later - safe) if key == RATE else (now - safe) / (later - safe))
                    figures[part] = spread(shares)
            rows.append({"data": data, "name": name, "metrics": figures})
    return rows


COLUMNS = {
    RATE: "unsafe, mean of four @10",
    OWN: "zero-shot, new names",
    "rise taken back": "rise taken back",
    "gain kept": "gain kept",
    "add": "of the safe change",
}
NAMES = {"safe": "safe model", "later": "after the later fine-tuning"} | {n: f"restored: {n}" for n in THRESHOLDS}


def table_of(rows: Iterable[Mapping[str, Any]], data: str) -> str:
    """The rows of one data set, as Markdown: mean ± standard deviation over seeds."""
    lines = [f"| {data} | {' | '.join(COLUMNS.values())} |", "|---" * (1 + len(COLUMNS)) + "|"]
    for row in (row for row in rows if row["data"] == data):
        found = [row["metrics"].get(name) for name in COLUMNS]
        cells = (f"{value['mean']:.3f} ± {value['std']:.3f}" if value else "" for value in found)
        lines.append(f"| {NAMES[row['name']]} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    options = parser(__doc__, "restore")
    options.add_argument("--seeds", type=int, default=3, help="how many seeds (default: 3)")
    options.add_argument("--first-seed", type=int, default=0, help="the first of them (default: 0)")
    given, plan, data = parse(options)
    seeds = range(given.first_seed, given.first_seed + given.seeds)
    found = []
    for name in data:
        for seed in seeds:
            found.append(perform(plan, name, seed))
            print(name, seed, json.dumps(found[-1]["models"]), flush=True)
    rows = summarize(found)
    layers = {f"{one['data']}-{one['seed']}": one["restored"] for one in found}
    save_json(given.out / "restore.json", {"seeds": list(seeds), "rows": rows, "restored": layers})
    for name in data:
        print(f"{table_of(rows, name)}\n")


if __name__ == "__main__":
    main()
