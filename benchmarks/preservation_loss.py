"""preservation_loss with one InfoNCE term, forward and backward, against eager: time and extra memory."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from compare import medians, report

import saferclip_fast as sf

WEIGHTS = {"cos_text": 0.0, "cos_image": 0.0, "nce_text": 1.0, "nce_image": 0.0}


def make(batch, dim):
    torch.manual_seed(0)
    rows = [torch.randn(batch, dim) for _ in range(4)]
    rows[0].requires_grad_()
    return rows


def eager(rows):
    rows[0].grad = None
    logits = 100 * F.normalize(rows[0], dim=1) @ F.normalize(rows[3], dim=1).T
    label = torch.arange(len(logits))
    ((F.cross_entropy(logits, label) + F.cross_entropy(logits.T, label)) / 2).backward()


def ours(rows):
    rows[0].grad = None
    sf.preservation_loss(*rows, weights=WEIGHTS, check=False).loss.backward()


def peak_megabytes() -> float:
    """Peak resident size of this process. Unlike getrusage, it starts anew at exec."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmHWM"].split()[0]) / 1024


def extra_megabytes(name: str, batch: int, dim: int) -> float:
    """Growth of the peak resident size over one call, in a process of its own."""
    command = [sys.executable, __file__, "--batch", str(batch), "--dim", str(dim), "--memory-of", name]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=8192)
    parser.add_argument("--dim", type=int, default=768)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--memory-of", choices=("ours", "eager"))
    parser.add_argument("--json")
    args = parser.parse_args()
    path = {"ours": ours, "eager": eager}
    if args.memory_of:
        path[args.memory_of](make(64, args.dim))
        rows = make(args.batch, args.dim)
        before = peak_megabytes()
        path[args.memory_of](rows)
        print(peak_megabytes() - before)
        return
    rows = make(args.batch, args.dim)
    x, y, logits = rows[0].detach(), rows[3], torch.empty(args.batch, args.batch)

    def three_products():
        torch.mm(x, y.T, out=logits)
        torch.mm(x, y.T, out=logits)
        return logits @ y

    times = medians(
        {"ours": lambda: ours(rows), "eager": lambda: eager(rows), "three_products": three_products}, args.rounds, 90
    )
    memory = {name: extra_megabytes(name, args.batch, args.dim) for name in path}
    row = {"B": args.batch, "d": args.dim, **{f"{k}_ms": v * 1e3 for k, v in times.items()}}
    row |= {"ours/eager": times["ours"] / times["eager"], "ours_MB": memory["ours"], "eager_MB": memory["eager"]}
    row["memory ours/eager"] = memory["ours"] / max(memory["eager"], 1e-9)
    report("preservation_loss forward + backward, one InfoNCE term", [row], args.json)


if __name__ == "__main__":
    main()
