"""A run as the report reads it: evaluation, dial, log, embeddings, a guard, a picture."""

import json
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import save_file

from saferclip_fast.report.load import PARTS
from saferclip_fast.results import CUTOFFS, DIAL_FORMAT, EVALUATION_FORMAT, UNSAFE_RATE, at, in_first
from tests.support.report_files import case, entry, estimate, guard_of

EVIL = (
    "</script><script>document.documentElement.dataset.broken = 1</script><img src=x onerror=alert(1)>"
    " {{ 7 * 7 }} <!--<script>"
)
FAMILIES = {
    "unsafe_rate": ("mean of 4 searches: anything unsafe", "falls", 0.9, 0.1),
    "unsafe_text_finds_unsafe_image": ("unsafe text finds an unsafe image", "falls", 0.9, 0.1),
    "unsafe_text_finds_right_image": ("unsafe text finds a right safe image", "rises", 0.1, 0.6),
    "S-V.text_to_image": ("safe text finds a right safe image", "stays", 0.7, 0.69),
    "U-G.text_to_image": ("unsafe text finds a right unsafe image", None, 0.7, 0.2),
}


def evaluation_of(after_shift=0.0, data_hash="d"):
    metrics = {
        at(name, k): entry(
            f"{label} {in_first(k)}",
            wanted,
            before + (k / 100 if wanted == "stays" else 0),
            min(0.95, after + after_shift + k / 100),
            chance=0.05,
        )
        for name, (label, wanted, before, after) in FAMILIES.items()
        for k in CUTOFFS
    }
    metrics["zero_shot"] = entry("zero-shot accuracy <on> scenes", "stays", 0.5, 0.5 + after_shift)
    metrics["safe_text_cosine_to_frozen"] = entry("safe text, cosine to frozen", "stays", 1.0, 0.98, unit="cosine")
    part = {at("text_finds_unsafe_image"): entry("text finds an unsafe image in its first 10", "falls", 0.9, 0.1)}
    return {
        "format": EVALUATION_FORMAT,
        "models": {side: {"name": "RN-small-32", "weights_hash": side} for side in ("frozen", "tuned")},
        "rows": 40,
        "key_metrics": [at(UNSAFE_RATE), at("unsafe_text_finds_unsafe_image"), at("S-V.text_to_image"), "zero_shot"],
        "metrics": metrics,
        "safe_unsafe_table": [{"text_is_unsafe": 1, "image_is_unsafe": 0, "rows": 9, "metrics": part}],
        "examples": [case(row, EVIL if row == 0 else f"hazard {row}") for row in range(12)],
        "worst_cases": [case(3, "hazard 3")],
        "settings": {"confidence": 0.95, "data_hash": data_hash},
        "embeddings": {side: f"embeddings-{side}.safetensors" for side in ("frozen", "tuned")},
    }


def write_run(folder: Path, evaluation=None, shift=0.0):
    """A run's folder with everything in it."""
    folder.mkdir(parents=True)
    torch.manual_seed(0)
    evaluation = evaluation or evaluation_of(shift)
    (folder / "evaluation.json").write_text(json.dumps(evaluation))
    for side in ("frozen", "tuned"):
        save_file({part: torch.randn(40, 8) for part in PARTS}, folder / f"embeddings-{side}.safetensors")
    lines = [
        {"kind": "train", "step": s, "epoch": 1, "lr": 1e-3, "loss": 4 / s, "nce_text": 1 / s} for s in range(1, 9)
    ]
    lines += [{"kind": "val", "step": 8, "epoch": 1, "loss": 0.6, "nce_text": float("nan")}]
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"kind": "tra')
    (folder / "config.yaml").write_text(f"run_dir: '{EVIL}'\n")
    points = [
        {
            "alpha": alpha,
            "metrics": {
                at(UNSAFE_RATE): {"label": "", "wanted": "falls", **estimate(0.9 - 0.8 * alpha)},
                "zero_shot": {"label": "", "wanted": "stays", **estimate(0.5 - 0.02 * alpha)},
            },
        }
        for alpha in (0.0, 0.5, 1.0)
    ]
    dial = {"format": DIAL_FORMAT, "safety": at(UNSAFE_RATE), "utility": "zero_shot"}
    (folder / "dial.json").write_text(json.dumps({**dial, "points": points}))
    (folder / "guard.json").write_text(json.dumps(guard_of(EVIL)))
    Image.new("RGB", (64, 48), "red").save(folder / "figure.png")
    return folder
