"""How well a guard tells unsafe from safe, and what it costs: python -m benchmarks.quality.guard --photos FILE.tar

On scenes and photographs, three seeds: fitted on training quadruplets, stopped, chosen and calibrated on validation
data, reported on test data that chose nothing. Nothing is fine-tuned: a guard reads the frozen model's embeddings.
Writes guard.json and guard.md to --out.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.quality.comparison import SETTINGS, run_of
from benchmarks.quality.runs import FROZEN, Plan, Run, job_of, options_of, parse, parser, pretrain, spread
from saferclip_fast.cli import MISTAKES
from saferclip_fast.config import load_config
from saferclip_fast.data import QuadrupletDataset, open_quadruplets
from saferclip_fast.guard import Guard
from saferclip_fast.guard.call import Parts, embedded, fit_parts
from saferclip_fast.guard.figures import auroc
from saferclip_fast.guard.fit import HIDDEN
from saferclip_fast.guard.model import MODALITIES, Head
from saferclip_fast.models import ClipModel, load_clip
from saferclip_fast.storage.files import save_json

FIRST_SEED, SEEDS = 3, 3  # seed 0 was looked at when the learning rate was chosen
GOALS = {"scenes": 0.98, "photos": 0.95}  # area under the ROC curve
COST = 0.01  # of an embedding's operations, at most
ENCODERS = {"RN-small-32": 256, "ViT-B-32": 1}  # of the other figures, and a usual one; items at once, for the time
ROUNDS = 20


def parts_of(plan: Plan, data: str, seed: int) -> tuple[ClipModel, Parts, dict[str, QuadrupletDataset]]:
    """The frozen model of one seed, and its training, validation and test rows, embedded and as they are."""
    run = Run(data, FROZEN, seed)
    watched = run_of(plan, data, "SafeR-CLIP", next(iter(SETTINGS["SafeR-CLIP"])), seed, 0.0).options[-1]
    job = job_of(plan, run)
    config = load_config(job.config, [*options_of(plan, run), watched])
    clip = load_clip(config.model.name, str(pretrain(plan, data)))
    sets: dict[str, QuadrupletDataset] = {
        "train": open_quadruplets(config.data.train, transform=clip.preprocess),
        "validation": open_quadruplets(config.data.val, transform=clip.preprocess),
        "test": job.held_out,
    }
    job.held_out.transform = clip.preprocess
    return clip, Parts(**{name: embedded(clip, part, plan.cache, progress=False) for name, part in sets.items()}), sets


def figures_of(plan: Plan, data: str, seed: int) -> dict[str, Any]:
    """A guard on one seed's data: its figures, and those of captions that no training row has."""
    clip, parts, sets = parts_of(plan, data, seed)
    start = time.perf_counter()
    guard = fit_parts(clip, parts, seed=seed, progress=False)
    found = {"data": data, "seed": seed, "seconds": time.perf_counter() - start}
    for modality, entry in guard.figures["modalities"].items():
        found[modality] = {key: value for key, value in entry.items() if key not in ("roc", "gate")}  # long; gate.py
    return found | {"new_captions": _new_captions(guard, parts, sets)}


def _new_captions(guard: Guard, parts: Parts, sets: dict[str, QuadrupletDataset]) -> dict[str, Any]:
    """The area under the ROC curve over test captions that are no training row's; None where one kind is missing."""
    assert guard.text is not None
    seen = {text for row in sets["train"].records for text in (row.safe_text, row.unsafe_text)}
    rows = sets["test"].records
    new = torch.tensor([t not in seen for t in [*(r.safe_text for r in rows), *(r.unsafe_text for r in rows)]])
    items = parts.test.items("text")
    unsafe = items.unsafe[new]
    both = bool(unsafe.any() and (~unsafe).any())
    area = auroc(guard.text(items.embeddings[new]), unsafe).value if both else None
    return {"share": float(new.double().mean()), "auroc": area}


def costs(name: str, items: int) -> dict[str, Any]:
    """Operations and seconds of the embeddings of `items` texts or images, and of the larger head on them."""
    clip = load_clip(name)
    size = clip.preprocessing["size"]
    side = size if isinstance(size, int) else size[0]
    heads = {kind: Head(kind, clip.config["model_cfg"]["embed_dim"], HIDDEN) for kind in MODALITIES}
    inputs = {
        "text": clip.tokenizer(["a photo of a dog on a lawn"] * items),
        "image": torch.randn(items, 3, side, side),
    }
    encode: dict[str, Callable[[Tensor], Tensor]] = {"text": clip.encode_text, "image": clip.encode_image}
    return {kind: {"items": items} | _cost(encode[kind], heads[kind], inputs[kind]) for kind in MODALITIES}


@torch.no_grad()
def _cost(encode: Callable[[Tensor], Tensor], head: Head, given: Tensor) -> dict[str, float]:
    embedding = encode(given)
    found: dict[str, float] = {}
    for name, call in {"embedding": lambda: encode(given), "guard": lambda: head(embedding)}.items():
        with FlopCounterMode(display=False) as counter:
            call()
        found[f"{name}_flops"] = counter.get_total_flops()
        times = []
        for _ in range(ROUNDS):
            start = time.perf_counter()
            call()
            times.append(time.perf_counter() - start)
        found[f"{name}_seconds"] = statistics.median(times)
    return found | {kind: found[f"guard_{kind}"] / found[f"embedding_{kind}"] for kind in ("flops", "seconds")}


def tables(summary: dict[str, Any]) -> str:
    """The figures as Markdown."""
    lines = [
        "| data | of | area under ROC, mean (least) | least lower bound | ECE | found, false alarms at 0.5 | guard |"
    ]
    lines.append("|---" * 7 + "|")
    for row in summary["rows"]:
        area, half = row["auroc"], row["at_half"]
        lines.append(
            f"| {row['data']} | {row['modality']} | {area['mean']:.4f} ({min(area['seeds']):.4f}) | {row['low']:.4f} | "
            f"{row['ece']['mean']:.4f} ± {row['ece']['std']:.4f} | {half['found']:.1%}, {half['false_alarms']:.1%} | "
            f"{', '.join('logistic' if hidden == 0 else f'{hidden} hidden' for hidden in row['hidden'])} |"
        )
    lines += [
        "",
        "| encoder | of | guard's operations, one item | of the embedding's | of its time |",
        "|---" * 5 + "|",
    ]
    for name, found in summary["costs"].items():
        for kind, cost in found.items():
            shares = f"{cost['flops']:.3%} | {cost['seconds']:.2%} ({cost['items']} at once)"
            lines.append(f"| {name} | {kind} | {cost['guard_flops'] / cost['items']:,.0f} | {shares} |")
    return "\n".join(lines)


def over_seeds(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for each data and modality: mean, standard deviation and values over seeds."""
    rows = []
    for data in dict.fromkeys(entry["data"] for entry in found):
        for modality in MODALITIES:
            entries = [entry[modality] for entry in found if entry["data"] == data]
            rows.append(
                {
                    "data": data,
                    "modality": modality,
                    "auroc": spread(entry["auroc"]["value"] for entry in entries),
                    "low": min(entry["auroc"]["low"] for entry in entries),
                    "ece": spread(entry["ece"] for entry in entries),
                    "at_half": {
                        kind: statistics.mean(entry["at_half"][kind] for entry in entries)
                        for kind in ("found", "false_alarms")
                    },
                    "hidden": [entry["hidden"] for entry in entries],
                }
            )
    return rows


def misses(summary: dict[str, Any]) -> list[str]:
    """What falls short of GOALS and COST, in words."""
    low = [r for r in summary["rows"] if min(r["auroc"]["seeds"]) < GOALS[r["data"]]]
    dear = [(name, kind) for name, found in summary["costs"].items() for kind in found if found[kind]["flops"] > COST]
    said = [f"{r['data']}, {r['modality']}: area {min(r['auroc']['seeds']):.4f}, under {GOALS[r['data']]}" for r in low]
    return said + [f"{name}, {kind}: more than {COST:.0%} of an embedding's operations" for name, kind in dear]


def main() -> int:
    given, plan, data = parse(parser(__doc__, "guard"))
    seeds = range(FIRST_SEED, FIRST_SEED + SEEDS)
    try:
        found = [figures_of(plan, name, seed) for name in data for seed in seeds]
    except MISTAKES as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    summary = {
        "format": "saferclip_fast.guard_benchmark.v1",
        "quadruplets": plan.quadruplets,
        "seeds": list(seeds),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "rows": over_seeds(found),
        "costs": {name: costs(name, items) for name, items in ENCODERS.items()},
        "runs": found,
    }
    save_json(given.out / "guard.json", summary)
    (given.out / "guard.md").write_text(tables(summary) + "\n", encoding="utf-8")
    print(tables(summary))
    print("\n".join(misses(summary)) or "every goal is met")
    return 0


if __name__ == "__main__":
    sys.exit(main())
