"""Checks that torchrun runs on each rank: `python -m tests.train.ranks.checks FOLDER WEIGHTS`. A failed one ends it.

The last rank has no query, or fewer rows than the others, wherever that is allowed.
"""

import contextlib
import functools
import shutil
import sys
from pathlib import Path

import torch
from torch.nn.functional import normalize

from saferclip_fast import SafeBank, embeddings, nearest_safe
from saferclip_fast.bank.sharded import ShardedBank
from saferclip_fast.config import Config
from saferclip_fast.data import collate, open_quadruplets
from saferclip_fast.data.curriculum import RankBatches
from saferclip_fast.data.quadruplets import QuadrupletEmbeddings
from saferclip_fast.embeddings import embed_quadruplets
from saferclip_fast.models import ClipModel, load_clip
from saferclip_fast.models.lora import start_tensors
from saferclip_fast.objectives import SafeClip, SaferClip, ShieldClip
from saferclip_fast.objectives.rank_guard import rank_guard, rank_guards
from saferclip_fast.objectives.safe_geometry import neighbors_lost, of_batch, spread_lost
from saferclip_fast.runtime.ranks import Ranks, ranks, split
from saferclip_fast.storage import row_cache
from saferclip_fast.train import Trainer
from saferclip_fast.train.device import compile_encoders
from saferclip_fast.train.fisher import start_adapters
from saferclip_fast.train.fsdp import sliced_like, whole
from saferclip_fast.train.prepare import TrainingData, prepare
from tests.support.tiny import tiny

OBJECTIVES = {
    "saferclip": lambda: SaferClip(k=3),
    "saferclip_frozen": lambda: SaferClip(k=1, negative="frozen"),
    "saferclip_geometry": lambda: SaferClip({"spread": 8.0, "neighbors": 8.0}),
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
    assert of.gather_rows(torch.arange(mine.start, mine.stop)).tolist() == list(range(7))
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
            small, numbered = sharded.gather(found)
            assert torch.equal(small.text[numbered.indices], bank.text[found.indices])
            assert torch.equal(small.image[numbered.indices], bank.image[found.indices])


def check_rank_guards(of: Ranks) -> None:
    """The same guards, and the same values, over slices of a bank as on one device."""
    bank, x = random_bank(50, 24), normalize(torch.randn(9, 24, generator=torch.Generator().manual_seed(8)), dim=-1)
    mine = of.split(len(x))
    whole = rank_guards(bank, 0.1)
    slices = rank_guards(ShardedBank(bank.shard(of.rank, of.world), of, len(bank)), 0.1)
    for guard, sliced in zip(whole, slices, strict=True):
        part, weights = slice(mine.start, mine.stop), torch.arange(9.0)
        expected = rank_guard(x, guard, 5, 0.02, weights)
        found = rank_guard(x[part], sliced, 5, 0.02, weights[part])
        assert torch.equal(found.values, expected.values[part])
        torch.testing.assert_close(of.sum(found.loss), expected.loss)


def check_safe_geometry(of: Ranks) -> None:
    """Spread and neighbors are no sums over rows: shares of their values and gradients, of rows that crowd together."""
    frozen = torch.randn(4 * of.world + 1, 24, generator=torch.Generator().manual_seed(9))
    rows, share = of.split(len(frozen)), of.share(len(frozen))
    mine = slice(rows.start, rows.stop)
    for term in (spread_lost, functools.partial(neighbors_lost, k=4)):
        whole = (frozen.roll(1, 1) + 1).requires_grad_()
        part = whole.detach()[mine].clone().requires_grad_()
        expected, found = term(whole, frozen), of_batch(term, part, frozen[mine], share)
        expected.backward()
        found.backward()
        assert expected > 0.1
        torch.testing.assert_close(of.sum(found.detach()), expected.detach())
        torch.testing.assert_close(part.grad, whole.grad[mine], rtol=1e-5, atol=1e-7)


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
        objective.attach(bank)
        scores = [tuple(torch.rand(2, rows, generator=generator))] if objective.takes_scores else []
        for labels in ((None, None), mixed, (last, last), (last, 1 - last), *scores):
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


def check_embedding_pass(of: Ranks, folder: Path, weights: str) -> None:
    """Each rank computes its part of the frozen embeddings, into one file; the parts of a killed pass are kept."""
    clip = load_clip("ViT-tiny-8-32", weights)
    dataset = open_quadruplets("scenes:n=23,size=32", transform=clip.preprocess)
    seen: list[int] = []
    compute = embeddings.embed_batch

    def counted(clip, batch, precision, dies_after=None):
        seen.extend(batch["index"].tolist())
        if dies_after is not None and len(seen) > dies_after:
            raise KeyboardInterrupt
        return compute(clip, batch, precision)

    row_cache._SYNC_BYTES = 2 * 4 * 64 * 4  # two rows of four embeddings
    options = {"batch_size": 2, "progress": False, "ranks": of}
    embeddings.embed_batch = functools.partial(counted, dies_after=4)
    with contextlib.suppress(KeyboardInterrupt):
        embed_quadruplets(clip, dataset, folder / "embedded", **options)
    assert len(seen) == 6
    of.wait()
    seen.clear()
    embeddings.embed_batch = counted
    found = embed_quadruplets(clip, dataset, folder / "embedded", **options)
    embeddings.embed_batch = compute
    again = of.gather_rows(torch.tensor(seen)).tolist()
    assert len(again) == len(set(again)) == 23 - 4 * of.world, "what was on disk is not computed again, nor twice"
    batch = collate(clip.tokenizer)([dataset[i] for i in range(23)])
    with clip.frozen():
        expected = compute(clip, batch)
    for rows, wanted in zip(found.embeddings, expected, strict=True):
        torch.testing.assert_close(rows, wanted)


def check_training_gradients(of: Ranks, folder: Path, weights: str) -> None:
    """Data parallel steps: the gradient that one process computes of the same batch, in every way to hold the bank."""
    for words in (
        ("objective.bank=resident", "train.batch_size=16", "data.train=scenes:n=40,size=32,mixed=0.5"),
        ("objective.bank=resident", "train.batch_size=100"),  # one batch of 29 rows: the others got fewer
        ("objective.bank=sharded", "objective.k=3", "objective.neighbors=in_step", "train.micro_batch_size=4"),
        ("objective.bank=mapped", "objective.k=3", "model.tuning=full", "train.checkpointing=true"),
        ("objective.name=shieldclip", "data.train=scenes:n=40,size=32,mixed=0.5", "train.micro_batch_size=3"),
        ("model.tuning=full", "train.fsdp=true", "train.checkpointing=true"),
        ("train.compile=true",),
    ):
        caches = [folder / "cache", folder / f"cache-{of.rank}"]
        config, own = (tiny(folder / "unused", weights, cache, "lora.dropout=0", *words) for cache in caches)
        own.train.compile = False
        shared = Trainer(config, *prepared(config, of), of)
        shutil.copytree(caches[0], caches[1], dirs_exist_ok=True)
        for found in caches[1].glob("neighbors-*"):  # these are found again, from the same embeddings: no ties differ
            found.unlink()
        alone = Trainer(own, *prepared(own, Ranks()))
        assert torch.equal(alone.data.similarity, shared.data.similarity)
        rows = min(config.train.batch_size, alone.sampler.epoch_size(1))
        gradients = []
        for trainer, members in ((alone, Ranks()), (shared, of)):
            trainer.clip.train()
            with torch.no_grad():  # adapters away from zero, the same ones
                generator = torch.Generator().manual_seed(5)
                for p in trainer.state.trainable.values():
                    p += sliced_like(p, 0.02 * torch.randn(p.shape, generator=generator))
            batches = RankBatches(trainer.sampler, rows, True, members.rank, members.world)
            trainer.gradients(next(iter(trainer.loader(trainer.data.train, batches))), members.share(rows))
            gradients.append(torch.cat([whole(p.grad).flatten() for p in trainer.state.trainable.values()]))
        error = (gradients[1] - gradients[0]).norm() / gradients[0].norm()
        assert error < 1e-5, (words, error)


def check_validation(of: Ranks, folder: Path, weights: str) -> None:
    """The figures of one process, also where the rows make fewer batches than there are ranks."""
    for size in (3, 100):
        config = tiny(folder / "unused", weights, folder / "cache", f"train.batch_size={size}")
        found = []
        for members in (Ranks(), of):
            trainer = Trainer(config, *prepared(config, members), members)
            found.append(trainer.validate(trainer.data.val))
        assert found[0].keys() == found[1].keys() and {"loss", "recall", "recall_sum"} <= found[0].keys()
        for name, value in found[0].items():
            assert abs(found[1][name] - value) < 1e-5 * max(1.0, abs(value)), (size, name, found)


def check_fisher_start(of: Ranks, folder: Path, weights: str) -> None:
    """The same bits on every rank, and what one process finds: samples are dealt out, their squares added up."""
    words = ("lora.init=fisher", "objective.bank=sharded", "objective.k=3", "objective.neighbors=in_step")
    config = tiny(folder / "unused", weights, folder / "cache", *words, "data.train=scenes:n=40,size=32,mixed=0.5")
    products = []
    for members in (of, Ranks()):
        clip = load_clip(config.model.name, config.model.pretrained)
        data = prepare(config, clip, members)
        torch.manual_seed(0)
        clip.add_lora(4, start=True)
        trainer = Trainer(config, clip, data, members)
        start_adapters(trainer.state, data.train, trainer.loader, trainer.loss)
        starts = start_tensors(clip.model)
        for tensor in starts.values():
            assert all(torch.equal(tensor, other) for other in members.stack(tensor))
        values = [*starts.values()]
        products.append(torch.cat([(b @ a).flatten() for a, b in zip(values[::2], values[1::2], strict=True)]))
    error = (products[0] - products[1]).norm() / products[1].norm()
    assert error < 1e-3, error


def prepared(config: Config, of: Ranks) -> tuple[ClipModel, TrainingData]:
    clip = load_clip(config.model.name, config.model.pretrained)
    data = prepare(config, clip, of)
    torch.manual_seed(0)
    if config.model.tuning == "full":
        clip.unfreeze()
    else:
        clip.add_lora(4)
    if config.train.checkpointing:
        clip.model.set_grad_checkpointing()
    if config.train.compile:
        compile_encoders(clip)
    return clip, data


def main(folder: Path, weights: str) -> None:
    torch.set_num_threads(1)
    compile_ = torch.compile  # inductor takes longer, and is tested elsewhere
    torch.compile = lambda call, options, **more: compile_(call, backend="eager", **more)
    with ranks() as of:
        for check in (check_exchanges, check_sharded_search, check_rank_guards, check_safe_geometry, check_objectives):
            check(of)
        if of.world > 2:  # whole models take long, and three ranks are the general case
            for check in (check_embedding_pass, check_training_gradients, check_validation, check_fisher_start):
                check(of, folder, weights)
        (folder / f"passed-{of.rank}").touch()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
