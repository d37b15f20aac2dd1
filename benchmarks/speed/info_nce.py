"""info_nce with the gradient of one side, against eager PyTorch, torch.compile and its matrix products alone.

`ours`: logits kept for the gradient (up to the default limit), two products. `ours_streamed`: computed again, three.
`chosen`: the share of rows that a mask chooses; PyTorch selects them first. `products`: two matrix products.
`chunked_linear_cross_entropy`: F.linear_cross_entropy (from torch 2.13 on), once for each direction, in chunks of its
own choice (the options' defaults: "auto", "compact"), which hold less than the logits as ours_streamed does.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

import saferclip_fast as sf
from benchmarks import harness
from benchmarks.speed.preservation_loss import eager

BASE = {"B": 1024, "d": 768, "chosen": 1.0}
VARIED = {"B": (256, 1024, 4096), "chosen": (1.0, 0.5)}


def linear_cross_entropy(x: Tensor, y: Tensor) -> Tensor:
    """Both directions by torch's own op, which makes the gradients chunk by chunk, with the loss."""
    u, v = F.normalize(x, dim=1), F.normalize(y, dim=1)
    label, options = torch.arange(len(u)), torch.nn.LinearCrossEntropyOptions()
    there = F.linear_cross_entropy(100 * u, v, label, options=options)
    return (there + F.linear_cross_entropy(100 * v, u, label, options=options)) / 2


def paths(B: int, d: int, chosen: float) -> harness.Paths:
    x, y = torch.randn(2, B, d)
    x.requires_grad_()
    mask = torch.arange(B) % 100 < 100 * chosen if chosen < 1 else None
    compiled = torch.compile(eager, dynamic=False)
    rows = x.detach() if mask is None else x.detach()[mask]
    others = y if mask is None else y[mask]
    logits = torch.empty(len(rows), len(rows))

    def ours(limit: float) -> Tensor:
        return sf.info_nce(x, y, mask=mask, logits_mib=limit, check=False)

    def plain(loss) -> Tensor:
        return loss(x, y) if mask is None else loss(x[mask], y[mask])

    def products() -> None:
        torch.mm(rows, others.T, out=logits)
        logits @ others

    found = {
        "ours": lambda: torch.autograd.grad(ours(256.0), x),
        "ours_streamed": lambda: torch.autograd.grad(ours(0.0), x),
        "eager": lambda: torch.autograd.grad(plain(eager), x),
        "compiled": lambda: torch.autograd.grad(plain(compiled), x),
        "products": products,
    }
    if hasattr(torch.nn, "LinearCrossEntropyOptions"):
        found["chunked_linear_cross_entropy"] = lambda: torch.autograd.grad(plain(linear_cross_entropy), x)
    return found


if __name__ == "__main__":
    harness.run("info_nce", harness.varied(BASE, VARIED), paths, harness.parser(__doc__, 5, 20).parse_args())
