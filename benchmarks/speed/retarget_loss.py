"""retarget_loss with given neighbors against eager PyTorch, torch.compile and a copy of the bytes it has to move.

`pass` forward: no gradients are asked for; both: the loss and the gradients of text and image. The op makes its
gradients together with the loss, so a backward pass alone is not a case.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F

import saferclip_fast as sf
from benchmarks import harness

BANK = 100_000
BASE = {"B": 8192, "d": 768, "k": 1, "pass": "both"}
VARIED = {"B": (64, 1024, 8192), "d": (256, 768, 1536), "k": (1, 8), "pass": ("both", "forward")}


@lru_cache(1)
def bank_of(rows: int, d: int) -> sf.SafeBank:
    return sf.SafeBank(torch.randn(rows, d), torch.randn(rows, d))


def eager(text, image, frozen_text, frozen_image, bank_text, bank_image, indices, weights):
    u_t, u_v, r_t, r_v = (F.normalize(x, dim=1) for x in (text, image, frozen_text, frozen_image))
    if indices.shape[1] == 1:
        s_t, s_v = bank_text[indices[:, 0]], bank_image[indices[:, 0]]
    else:
        s_t, s_v = ((weights.unsqueeze(2) * rows[indices]).sum(1) for rows in (bank_text, bank_image))

    def dot(a, b):
        return (a * b).sum(1)

    uni = (1 - dot(u_t, s_t)).mean() + (1 - dot(u_v, s_v)).mean()
    cross_text = F.softplus(dot(u_t, r_v) - dot(u_t, s_v)).mean()
    return uni + cross_text + F.softplus(dot(u_v, r_t) - dot(u_v, s_t)).mean()


def paths(B: int, d: int, k: int, bank_rows: int = BANK, **case: str) -> harness.Paths:
    text, image, frozen_text, frozen_image = (torch.randn(B, d) for _ in range(4))
    bank = bank_of(bank_rows, d)
    given = sf.Neighbors(torch.rand(B, k), torch.randint(bank_rows, (B, k)))
    weights = torch.softmax(given.scores / 0.05, dim=1)
    source = torch.randn(4 * B * d)  # six rows read and two written: as many bytes as this copy moves
    target = torch.empty_like(source)
    rest = (frozen_text, frozen_image, bank.text, bank.image, given.indices, weights)

    def ours(text, image, *_):
        return sf.retarget_loss(text, image, frozen_text, frozen_image, bank, neighbors=given, check=False).loss

    def of(loss):
        if case["pass"] == "forward":
            return lambda: loss(text, image, *rest)
        # as in training, where the rows are an encoder's output and not leaves that accumulate
        trained = text.requires_grad_(), image.requires_grad_()
        return lambda: torch.autograd.grad(loss(*trained, *rest), trained)

    found = {"ours": of(ours), "eager": of(eager), "compiled": of(torch.compile(eager, dynamic=False))}
    return {**found, "copy": lambda: target.copy_(source)}


if __name__ == "__main__":
    harness.run("retarget_loss", harness.varied(BASE, VARIED), paths, harness.parser(__doc__, 15, 10).parse_args())
