"""retarget_loss, forward and backward with given neighbors, against eager, torch.compile and a memory copy."""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from compare import medians, report

import saferclip_fast as sf


def eager(text, image, frozen_text, frozen_image, bank_text, bank_image, neighbors):
    unit = [F.normalize(x, dim=1) for x in (text, image, frozen_text, frozen_image)]
    s_t, s_v = bank_text[neighbors], bank_image[neighbors]

    def dot(a, b):
        return (a * b).sum(1)

    uni = (1 - dot(unit[0], s_t)).mean() + (1 - dot(unit[1], s_v)).mean()
    cross_text = F.softplus(dot(unit[0], unit[3]) - dot(unit[0], s_v)).mean()
    return uni + cross_text + F.softplus(dot(unit[1], unit[2]) - dot(unit[1], s_t)).mean()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=8192)
    parser.add_argument("--dim", type=int, default=768)
    parser.add_argument("--bank", type=int, default=100_000)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json")
    args = parser.parse_args()
    torch.manual_seed(0)
    text, image, frozen_text, frozen_image = (torch.randn(args.batch, args.dim) for _ in range(4))
    bank = sf.SafeBank(torch.randn(args.bank, args.dim), torch.randn(args.bank, args.dim))
    indices = torch.randint(args.bank, (args.batch, 1))
    given = sf.Neighbors(torch.ones(args.batch, 1), indices)
    text.requires_grad_()
    image.requires_grad_()
    compiled = torch.compile(eager)
    moved = 8 * args.batch * args.dim  # six rows read, two written
    source, target = torch.randn(moved // 2), torch.empty(moved // 2)

    def train(loss):  # as in training, where the rows are an encoder's output and not leaves that accumulate
        return torch.autograd.grad(loss, (text, image))

    def ours():
        out = sf.retarget_loss(text, image, frozen_text, frozen_image, bank, neighbors=given, check=False)
        train(out.loss)

    rest = (frozen_text, frozen_image, bank.text, bank.image, indices[:, 0])
    op_args = (
        text.detach(),
        image.detach(),
        *rest[:4],
        indices,
        torch.ones(args.batch, 1),
        torch.full((args.batch, 4), 1 / args.batch),
        [1.0] * 4,
        1.0,
        0.0,
        False,
        True,
    )
    times = medians(
        {
            "ours": ours,
            "op_alone": lambda: torch.ops.saferclip_fast.retarget_loss(*op_args),
            "eager": lambda: train(eager(text, image, *rest)),
            "compiled": lambda: train(compiled(text, image, *rest)),
            "copy": lambda: target.copy_(source),
        },
        args.rounds,
    )
    row = {"B": args.batch, "d": args.dim, **{f"{k}_ms": v * 1e3 for k, v in times.items()}}
    row |= {f"{k}/ours": times[k] / times["ours"] for k in ("eager", "compiled")}
    row |= {"ours/copy": times["ours"] / times["copy"], "op_alone/copy": times["op_alone"] / times["copy"]}
    report("retarget_loss forward + backward", [row], args.json)


if __name__ == "__main__":
    main()
