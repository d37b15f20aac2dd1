"""What torchrun runs on each rank: `python -m tests.distributed.checks FOLDER`. A failed check ends the rank.

The last rank has no query, or fewer rows than the others, wherever that is allowed.
"""

import sys
from pathlib import Path

import torch

from saferclip_fast import SafeBank, nearest_safe
from saferclip_fast.distributed import Ranks, ranks, split
from saferclip_fast.objectives import QuadrupletEmbeddings, SafeClip, SaferClip, ShieldClip
from saferclip_fast.sharded import ShardedBank

OBJECTIVES = {
    "saferclip": lambda: SaferClip(k=3),
    "saferclip_frozen": lambda: SaferClip(k=1, negative="frozen"),
    "saferclip_no_nce": lambda: SaferClip({"nce_text": 0.0, "nce_image": 0.0}),
    "safeclip": SafeClip,
    "safeclip_nearest": lambda: SafeClip(targets="nearest"),
    "shieldclip": ShieldClip,
}


def random_bank(rows: int, width: int) -> SafeBank:
    generator = torch.Generator().manual_seed(1)
    text, image = torch.randn(2, rows, width, generator=generator)
    text[rows // 2 :] = text[: rows - rows // 2].clone()  # every text twice, in different slices: ties
    return SafeBank(text, image)


def check_exchanges(of: Ranks) -> None:
    mine = of.split(7)
    assert of.rows(torch.arange(mine.start, mine.stop)).tolist() == list(range(7))
    assert of.largest(of.rank) == of.world - 1
    assert of.sum(torch.tensor(2.0)).item() == 2 * of.world


def check_sharded_search(of: Ranks) -> None:
    """The same bits as on one device: ties, k above a slice's rows, a rank without queries, packed and not."""
    for rows, width, k in ((200, 32, 1), (200, 32, 5), (of.world + 1, 32, of.world + 1), (5000, 64, 17)):
        whole = random_bank(rows, width)
        queries = torch.randn(20, width, generator=torch.Generator().manual_seed(2))
        queries[3] = whole.text[rows // 2 - 1]  # found twice with the same score
        part = split(20, of.rank, of.world - 1) if of.rank < of.world - 1 else range(0)
        for bank in (whole, whole.pack()):
            sharded = ShardedBank(bank.shard(of.rank, of.world), of, rows)
            found = sharded.nearest(queries[part.start : part.stop], k)
            expected = nearest_safe(queries, bank, k)
            assert torch.equal(found.indices, expected.indices[part.start : part.stop])
            assert torch.equal(found.scores, expected.scores[part.start : part.stop])
            small, numbered = sharded.take(found)
            assert torch.equal(small.text[numbered.indices], bank.text[found.indices])
            assert torch.equal(small.image[numbered.indices], bank.image[found.indices])


def check_objectives(of: Ranks) -> None:
    """Shares of a batch: loss, terms and gradients of the whole batch, whatever the objective and the labels."""
    rows, width = 4 * of.world + 1, 24
    bank = random_bank(60, width)
    generator = torch.Generator().manual_seed(3)
    current = QuadrupletEmbeddings(*torch.randn(4, rows, width, generator=generator))
    frozen = QuadrupletEmbeddings(*torch.randn(4, rows, width, generator=generator))
    mixed = tuple(torch.randint(0, 2, (2, rows), generator=generator))
    share, mine = of.share(rows), slice(of.split(rows).start, of.split(rows).stop)
    last = torch.tensor([0] * (rows - 1) + [1])
    for name, make in OBJECTIVES.items():
        objective = make()
        for labels in ((None, None), mixed, (last, last), (last, 1 - last)):
            whole = [x.clone().requires_grad_() for x in current]
            part = [x[mine].clone().requires_grad_() for x in current]
            expected = objective(QuadrupletEmbeddings(*whole), frozen, bank, None, *labels)
            expected.loss.backward()
            rows_of_frozen = QuadrupletEmbeddings(*(x[mine] for x in frozen))
            own = [label if label is None else label[mine] for label in labels]
            out = objective(QuadrupletEmbeddings(*part), rows_of_frozen, bank, None, *own, share)
            out.loss.backward()
            torch.testing.assert_close(of.sum(out.loss), expected.loss.detach(), rtol=1e-5, atol=1e-6)
            assert out.terms.keys() == expected.terms.keys()
            for term, value in expected.terms.items():
                torch.testing.assert_close(of.sum(out.terms[term]), value, rtol=1e-5, atol=1e-6, msg=f"{name} {term}")
            for x, y in zip(part, whole, strict=True):
                error = (x.grad - y.grad[mine]).norm() / y.grad.norm().clamp(min=1e-3)
                assert error < 1e-5, (name, labels, error)


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    with ranks() as of:
        for check in (check_exchanges, check_sharded_search, check_objectives):
            check(of)
            if of.first:
                (folder / check.__name__).touch()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
