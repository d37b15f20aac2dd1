"""Two ranks on two cores against one rank on one: a training step, its objective alone, the search in a sharded bank.

    torchrun --nproc-per-node=2 benchmarks/speed/scaling.py [--json FILE]

Each rank is bound to one core and one thread. In turns, the first rank does the whole work alone while the others wait,
and all do their shares; the figures are ratios of medians of one launch.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from saferclip_fast import Neighbors, SafeBank, nearest_safe
from saferclip_fast.bank.sharded import ShardedBank
from saferclip_fast.data.quadruplets import QuadrupletEmbeddings
from saferclip_fast.models import load_clip
from saferclip_fast.objectives import SaferClip
from saferclip_fast.runtime.ranks import ALONE, Ranks, Share, ranks
from saferclip_fast.train.device import data_parallel
from saferclip_fast.train.step import forward_backward

TOKENS = 24  # a real caption's length


def training_step(of: Ranks, model: str, batch_size: int) -> Callable[[bool], None]:
    """run(shared): forward and backward pass of one global batch with LoRA, by all ranks or by this one alone."""
    torch.manual_seed(0)
    clip = load_clip(model).add_lora(16)
    clip.train()
    parallel, objective = data_parallel(clip, of), SaferClip()
    size, width = clip.preprocessing["size"], clip.model.text_projection.shape[-1]
    size = size if isinstance(size, int) else size[0]
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(2, batch_size, 3, size, size, generator=generator)
    tokens = torch.randint(1, 40000, (2, batch_size, TOKENS), generator=generator)
    tokens[..., -1] = 49407  # the end of text
    bank = SafeBank(*torch.randn(2, 1000, width, generator=generator)).pack()
    objective.attach(bank)
    frozen = QuadrupletEmbeddings(*torch.randn(4, batch_size, width, generator=generator))

    def run(shared: bool) -> None:
        share: Share = of.share(batch_size) if shared else ALONE
        rows = of.split(batch_size) if shared else range(batch_size)
        mine = slice(rows.start, rows.stop)
        batch = {
            "index": torch.arange(len(rows)),
            "safe_image": images[0, mine],
            "unsafe_image": images[1, mine],
            "safe_tokens": tokens[0, mine],
            "unsafe_tokens": tokens[1, mine],
            "safe_lengths": [TOKENS] * len(rows),
            "unsafe_lengths": [TOKENS] * len(rows),
        }
        own = QuadrupletEmbeddings(*(column[mine] for column in frozen))
        forward_backward(
            clip, batch, lambda x: objective(x, own, bank, share=share), encode=parallel if shared else None
        )
        clip.zero_grad(set_to_none=True)

    return run


def default_objective(of: Ranks, bank_rows: int, width: int, batch_size: int, k: int) -> Callable[[bool], None]:
    """run(shared): loss and gradients of the default objective, from given embeddings of one global batch."""
    generator = torch.Generator().manual_seed(3)
    center = torch.randn(width, generator=generator)  # embeddings of one modality lie in a cone

    def rows(count: int) -> torch.Tensor:
        return torch.randn(count, width, generator=generator) + center

    bank = SafeBank(rows(bank_rows), rows(bank_rows)).pack()
    current = [rows(batch_size) for _ in range(4)]
    frozen = QuadrupletEmbeddings(*(rows(batch_size) for _ in range(4)))
    neighbors = nearest_safe(frozen.unsafe_text, bank, k)
    objective = SaferClip(k=k)
    objective.attach(bank)

    def run(shared: bool) -> None:
        share: Share = of.share(batch_size) if shared else ALONE
        of_rank = of.split(batch_size) if shared else range(batch_size)
        mine = slice(of_rank.start, of_rank.stop)
        x = QuadrupletEmbeddings(*(column[mine].clone().requires_grad_() for column in current))
        own = QuadrupletEmbeddings(*(column[mine] for column in frozen))
        found = Neighbors(*(column[mine] for column in neighbors))
        objective(x, own, bank, found, share=share).loss.backward()

    return run


def search(of: Ranks, rows: int, width: int, queries: int, k: int) -> Callable[[bool], None]:
    """run(shared): the neighbors of all queries, each rank asking for its part in the sharded bank, or one alone."""
    generator = torch.Generator().manual_seed(2)
    whole = SafeBank(*torch.randn(2, rows, width, generator=generator))
    query = torch.randn(queries, width, generator=generator)
    shard = whole.shard(of.rank, of.world).pack()
    sharded = ShardedBank(shard, of, rows)
    mine = of.split(queries)
    whole.pack()

    def run(shared: bool) -> None:
        if shared:
            sharded.nearest(query[mine.start : mine.stop], k, check=False)
        else:
            nearest_safe(query, whole, k, check=False)

    return run


def ratio(of: Ranks, run: Callable[[bool], None], repeats: int) -> dict[str, float]:
    """Median seconds alone and shared, and how much faster the ranks are together."""
    alone, shared = [], []
    for turn in range(repeats + 1):
        of.wait()
        began = time.perf_counter()
        if of.first:
            run(False)
        middle = time.perf_counter()
        of.wait()
        start = time.perf_counter()
        run(True)
        of.wait()
        if turn:  # the first one warms up
            alone.append(middle - began)
            shared.append(time.perf_counter() - start)
    one, all_ranks = statistics.median(alone), statistics.median(shared)
    return {"alone_s": one, "shared_s": all_ranks, "ratio": one / all_ranks}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--model", default="ViT-B-32", help="open_clip model of the training step, random weights")
    parser.add_argument("--batch", type=int, default=8, help="global batch of the training step")
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    with ranks() as of:
        os.sched_setaffinity(0, {sorted(os.sched_getaffinity(0))[of.rank]})
        torch.set_num_threads(1)
        figures = {
            "ranks": of.world,
            "search, 1024 queries in 200,000 rows, d 512, k 8": ratio(
                of, search(of, 200_000, 512, 1024, 8), arguments.repeats
            ),
            f"training step, {arguments.model}, LoRA 16, batch {arguments.batch}": ratio(
                of, training_step(of, arguments.model, arguments.batch), arguments.repeats
            ),
            "default objective from embeddings, B 4096, bank 50,000, d 768, k 16": ratio(
                of, default_objective(of, 50_000, 768, 4096, 16), arguments.repeats
            ),
        }
        if of.first:
            print(json.dumps(figures, indent=2))
            if arguments.json:
                arguments.json.parent.mkdir(parents=True, exist_ok=True)
                arguments.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
