"""Peak memory of a training step: a large batch in micro-batches against one batch of a micro-batch's size.

Measured is by how much the resident size of a process rises during one step (forward and backward pass, Adam) above
what it holds before: the model, the optimizer's moments, the batch, the bank. Each batch size has a process of its
own. Images of the batch are views of one image, so that the large batch itself, which would wait in the host's memory,
takes none. Linux.
"""

from __future__ import annotations

import argparse
import ctypes
import multiprocessing
import warnings
from pathlib import Path

import torch

from benchmarks.harness import extra_memory, machine, print_row
from benchmarks.speed.train_step import Ours, make_batch
from saferclip_fast.bank import SafeBank
from saferclip_fast.data.quadruplets import QuadrupletEmbeddings
from saferclip_fast.models import load_clip
from saferclip_fast.storage.files import save_json

M_MMAP_THRESHOLD = -3  # of malloc.h


def step_memory(model: str, tuning: str, rows: int, micro: int) -> tuple[float, int]:
    """MiB that one step takes at its peak, and the width of the embeddings."""
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        clip = load_clip(model)
    clip = (clip.add_lora(16) if tuning == "lora" else clip.unfreeze()).train()
    size = clip.preprocessing["size"]
    size = size if isinstance(size, int) else size[0]
    width = clip.exported_state_dict()["text_projection"].shape[1]
    # each tensor a mapping of its own, so that what is freed leaves the resident size at once
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 1 << 16)
    steps = []
    for count in (2, rows):
        batch = make_batch(count, 1, 8, 25)
        for side in ("safe", "unsafe"):
            batch[f"{side}_image"] = torch.randn(1, 3, size, size).expand(count, 3, size, size)
        frozen = QuadrupletEmbeddings(*torch.randn(4, count, width))
        steps.append(Ours(clip, batch, frozen, SafeBank(frozen.safe_text, frozen.safe_image), micro))
    steps[0]()  # loads what is loaded once, and makes the optimizer's moments
    steps[1].optimizer = steps[0].optimizer
    return extra_memory(steps[1]), width


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="ViT-small-8-64", help="open_clip model, random weights")
    parser.add_argument("--tuning", choices=("lora", "full"), default="lora")
    parser.add_argument("--micro", type=int, default=16)
    parser.add_argument("--batches", type=int, nargs="+", default=(4096,))
    parser.add_argument("--json")
    args = parser.parse_args()
    print(f"memory of a step, {args.model}, {args.tuning}, fp32")
    rows: list[dict[str, object]] = []
    small = 0.0
    for batch in (args.micro, *args.batches):
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            peak, width = pool.apply(step_memory, (args.model, args.tuning, batch, args.micro))
        small = small or peak
        embeddings = 4 * 4 * batch * width / 2**20
        row = {"batch": batch, "micro-batch": args.micro, "peak MiB": peak, "embeddings MiB": embeddings}
        rows.append(row | {"(peak - embeddings) / small": (peak - embeddings) / small})
        print_row(rows[-1])
    if args.json:
        save_json(Path(args.json), {"title": "step_memory", "machine": machine(), "rows": rows})


if __name__ == "__main__":
    main()
