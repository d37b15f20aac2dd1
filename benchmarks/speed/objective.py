"""The default objective of a training step, from given embeddings, against the same objective in plain PyTorch.

Loss and the gradients of the four current embeddings; neighbors are given (found before training), the rank guard's
queries are searched in every step. `ours_X`: one part of ours alone, to see where its time goes. The compiled rival
searches with torch.topk and stores every logit. `--profile`: the share of each torch op in ours instead, B 256, d 512.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import saferclip_fast as sf
from benchmarks import harness
from benchmarks.speed.preservation_loss import eager as info_nce
from saferclip_fast.data.quadruplets import QuadrupletEmbeddings
from saferclip_fast.objectives import DEFAULT_WEIGHTS, SaferClip
from saferclip_fast.objectives.rank_guard import RankGuards, rank_guard

BANK = 50_000
BASE = {"B": 1024, "d": 768, "k": 16}
VARIED = {"B": (256, 1024, 4096)}


def guard_hinge(x: Tensor, rows: Tensor, k: int) -> Tensor:
    """`rank_guard`'s mean over x [B, d], with rows g_j [N, d + 2] as it builds them."""
    u = F.normalize(x, dim=1)
    queries, limits = rows[:, : x.shape[1]], rows[:, x.shape[1]]
    with torch.no_grad():
        found = torch.addmm(limits, u, queries.T).topk(k).indices
    violation = (u.unsqueeze(1) * queries[found]).sum(2) + limits[found]
    return math.sqrt(2) * violation.clamp(min=0).sum(1).mean() / k


def redirection(current, frozen, bank, neighbors, objective: SaferClip) -> Tensor:
    """The four terms of `retarget_loss`, negative "current"."""
    u, z = (F.normalize(rows, dim=1) for rows in current[2:])
    share = torch.softmax(neighbors.scores / objective.tau, dim=1).unsqueeze(2)
    text, image = ((share * rows[neighbors.indices]).sum(1) for rows in (bank.text, bank.image))
    beta, margin = objective.beta, objective.margin
    w = objective.weights
    loss = w["uni_text"] * (1 - (u * text).sum(1)).mean() + w["uni_image"] * (1 - (z * image).sum(1)).mean()
    for own, other, target, name in ((u, z, image, "cross_text"), (z, u, text, "cross_image")):
        push = (own * other.detach()).sum(1) - (own * target).sum(1)
        loss = loss + w[name] * (F.softplus(beta * (push + margin)) / beta).mean()
    return loss


def preservation(current, frozen, weights, contrast=info_nce) -> Tensor:
    loss = current.safe_text.new_zeros(())
    for name, x, same, other in (
        ("text", current.safe_text, frozen.safe_text, frozen.safe_image),
        ("image", current.safe_image, frozen.safe_image, frozen.safe_text),
    ):
        loss = loss + weights[f"cos_{name}"] * (1 - F.cosine_similarity(x, same)).mean()
        loss = loss + weights[f"nce_{name}"] * contrast(x, other)
    return loss


class Setting(NamedTuple):
    """What is there before the first step, and does not depend on the batch."""

    center: Tensor  # embeddings of one modality lie in a cone
    bank: sf.SafeBank
    objective: SaferClip

    def rows(self, count: int, generator: torch.Generator) -> Tensor:
        return torch.randn(count, len(self.center), generator=generator) + self.center

    def batch(self, size: int, k: int) -> tuple[QuadrupletEmbeddings, QuadrupletEmbeddings, sf.Neighbors]:
        """(current, frozen, neighbors), the same for every process."""
        generator = torch.Generator().manual_seed(1)
        current, frozen = (
            QuadrupletEmbeddings(*(self.rows(size, generator) for _ in range(4))) for _ in ("current", "frozen")
        )
        return current, frozen, sf.nearest_safe(frozen.unsafe_text, self.bank, k)


@functools.cache  # takes longer than a case: the limits of all safe queries
def setting(d: int, k: int, bank_rows: int) -> Setting:
    generator = torch.Generator().manual_seed(0)
    center = torch.randn(d, generator=generator)
    text, image = torch.randn(2, bank_rows, d, generator=generator) + center
    found = Setting(center, sf.SafeBank(text, image).pack(), SaferClip(k=k, guard_k=k))
    found.objective.attach(found.bank)
    return found


def plain_objective(current, frozen, bank, neighbors, guards, objective: SaferClip, contrast=info_nce) -> Tensor:
    """The default objective in PyTorch; `guards`: the rows g_j of texts and of images."""
    loss = redirection(current, frozen, bank, neighbors, objective)
    loss = loss + preservation(current, frozen, objective.weights, contrast)
    hinges = [guard_hinge(x, rows, objective.guard_k) for x, rows in zip(current[2:], guards, strict=True)]
    return loss + objective.weights["rank_guard"] * (hinges[0] + hinges[1])


def guard_rows(objective: SaferClip) -> tuple[Tensor, Tensor]:
    assert isinstance(objective.guards, RankGuards)
    return objective.guards.of_text.bank.image, objective.guards.of_image.bank.image


def paths(B: int, d: int, k: int, bank_rows: int = BANK) -> harness.Paths:
    _, bank, objective = known = setting(d, k, bank_rows)
    current, frozen, neighbors = known.batch(B, k)
    for x in current:
        x.requires_grad_()
    guards = objective.guards
    assert isinstance(guards, RankGuards)
    share = torch.full((B,), 1 / B)

    def gradient(loss: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(loss, current, allow_unused=True)

    compiled = torch.compile(plain_objective, dynamic=False)
    given = (current, frozen, bank, neighbors, guard_rows(objective), objective)
    of_terms = {
        name: SaferClip({term: 0.0 for term in DEFAULT_WEIGHTS if term.split("_")[0] not in terms}, k=k)
        for name, terms in (("ours_redirection", ("uni", "cross")), ("ours_preservation", ("cos", "nce")))
    }

    def guarded() -> Tensor:
        parts = [rank_guard(x, guard, k, 0.0, share).loss for x, guard in zip(current[2:], guards, strict=True)]
        return parts[0] + parts[1]

    return {
        "ours": lambda: gradient(objective(current, frozen, bank, neighbors).loss),
        "eager": lambda: gradient(plain_objective(*given)),
        "compiled": lambda: gradient(compiled(*given)),
        "ours_guard": lambda: gradient(guarded()),
        **{
            name: lambda part=part: gradient(part(current, frozen, bank, neighbors).loss)
            for name, part in of_terms.items()
        },
    }


def profiled(rounds: int) -> dict[str, float]:
    """Share of the objective's time that each op itself takes, without what it calls; largest first."""
    ours = paths(256, 512, 16)["ours"]
    ours()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as found:
        for _ in range(rounds):
            ours()
    times = {event.key: event.self_cpu_time_total for event in found.key_averages()}
    return {name: times[name] / sum(times.values()) for name in sorted(times, key=times.__getitem__, reverse=True)}


if __name__ == "__main__":
    parser = harness.parser(__doc__, 5, 30)
    parser.add_argument("--profile", action="store_true", help="the share of each op, no comparison")
    given = parser.parse_args()
    if given.profile:
        print(
            "\n".join(
                f"{100 * share:5.1f} %  {name}" for name, share in profiled(given.rounds).items() if share > 0.002
            )
        )
    else:
        harness.run("objective", harness.varied(BASE, VARIED), paths, given)
