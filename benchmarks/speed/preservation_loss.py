"""preservation_loss, one InfoNCE term, against eager PyTorch, torch.compile and its matrix products alone.

`pass` forward: no gradients are asked for; both: the loss and the gradient of text. The op makes its gradients together
with the loss, so a backward pass alone is not a case. `products`: torch.mm alone, once for the
loss and twice more for the gradient, as often as a method needs it that does not store the B x B matrix.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

import saferclip_fast as sf
from benchmarks import harness

WEIGHTS = {"cos_text": 0.0, "cos_image": 0.0, "nce_text": 1.0, "nce_image": 0.0}
BASE = {"B": 4096, "d": 768, "pass": "both"}
VARIED = {"B": (256, 1024, 4096), "d": (256, 768), "pass": ("both", "forward")}
LARGE = [{"B": 8192, "d": 768, "pass": "both"}, {"B": 8192, "d": 768, "pass": "forward"}]


def eager(text, frozen_image):
    logits = 100 * F.normalize(text, dim=1) @ F.normalize(frozen_image, dim=1).T
    label = torch.arange(len(logits))
    return (F.cross_entropy(logits, label) + F.cross_entropy(logits.T, label)) / 2


def paths(B: int, d: int, **case: str) -> harness.Paths:
    text, image, frozen_text, frozen_image = (torch.randn(B, d) for _ in range(4))
    forward = case["pass"] == "forward"
    logits = torch.empty(B, B)

    def ours(text, frozen_image):
        return sf.preservation_loss(text, image, frozen_text, frozen_image, weights=WEIGHTS, check=False).loss

    def of(loss):
        if forward:
            return lambda: loss(text, frozen_image)
        text.requires_grad_()
        return lambda: torch.autograd.grad(loss(text, frozen_image), text)

    x = text.detach()

    def products():
        torch.mm(x, frozen_image.T, out=logits)
        if not forward:
            torch.mm(x, frozen_image.T, out=logits)
            logits @ frozen_image

    return {
        "ours": of(ours),
        "eager": of(eager),
        "compiled": of(torch.compile(eager, dynamic=False)),
        "products": products,
    }


if __name__ == "__main__":
    parser = harness.parser(__doc__, 5, 20)
    parser.add_argument("--large", action="store_true", help="B 8,192 instead: ten seconds a round on two cores")
    args = parser.parse_args()
    harness.run("preservation_loss", LARGE if args.large else harness.varied(BASE, VARIED), paths, args)
