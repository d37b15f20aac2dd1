"""Other libraries' exact searches, which nearest_safe is compared with. `differs.py` says what each leaves out.

Each function takes the bank [N, d], rows at length 1, builds what the library searches, and returns search(unit, k) for
queries [Q, d] at length 1. Building is not timed.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from benchmarks import harness

Search = Callable[[Tensor, int], object]
PART = 8192  # rows of the bank whose scores are held at a time, as in the chunked path of PyTorch
# FAISS's own benchmark of Panorama: 8 levels after a PCA that drops nothing; batches of 1,024, its default
PANORAMA = "PCA{d},FlatIPPanorama8_1024"
PCA_ROWS = 50_000  # of the bank, as there


def int8_mm(bank: Tensor) -> Search:
    """torch._int_mm alone. The queries are quantized in the call, which is not noticed beside the products."""
    rows = to_int8(bank)
    return lambda unit, k: torch._int_mm(to_int8(unit), rows.T)


def to_int8(unit: Tensor) -> Tensor:
    return (unit * 127).round().to(torch.int8)


def faiss_flat(bank: Tensor) -> Search:
    import faiss

    index = faiss.IndexFlatIP(bank.shape[1])
    index.add(bank.numpy())
    return lambda unit, k: index.search(unit.numpy(), k)


def faiss_panorama(bank: Tensor) -> Search:
    """IndexFlatIPPanorama behind a rotation, which makes its bounds tight; the call rotates the queries, too."""
    import faiss

    index = faiss.index_factory(bank.shape[1], PANORAMA.format(d=bank.shape[1]), faiss.METRIC_INNER_PRODUCT)
    sample = bank[:PCA_ROWS].numpy()
    index.train(np.concatenate([sample, -sample]))  # mean 0: a shift would change the order of inner products
    index.add(bank.numpy())
    return lambda unit, k: index.search(unit.numpy(), k)


def has_panorama() -> bool:
    import faiss

    return hasattr(faiss, "IndexFlatIPPanorama")


def numkong(bank: Tensor) -> Search:
    """Products with parts of the bank that are packed beforehand, a thread a part, then topk: NumKong has no search.

    Its own `threads=` splits the queries alone; threads outside, which its README also shows, serve one query, too.
    """
    import numkong

    packed = [numkong.dots_pack(part.numpy()) for part in bank.split(PART)]
    threads = torch.get_num_threads()
    pool = ThreadPoolExecutor(threads)

    def search(unit: Tensor, k: int) -> tuple[Tensor, Tensor]:
        queries, room = unit.numpy(), {}

        def products(number: int) -> Tensor:
            key = number % threads, packed[number].width  # a thread's parts of one width share their room
            if key not in room:
                room[key] = numkong.empty((len(queries), packed[number].width), dtype="float64")
            numkong.dots_packed(queries, packed[number], out=room[key])
            return torch.from_numpy(np.asarray(room[key]))

        best = torch.empty(len(unit), 0, dtype=torch.float64), torch.empty(len(unit), 0, dtype=torch.int64)
        for first in range(0, len(packed), threads):
            numbers = range(first, min(first + threads, len(packed)))
            for number, scores in zip(numbers, pool.map(products, numbers), strict=True):
                best = best_of(*best, scores, number * PART, k)
        return best

    return search


def best_of(scores: Tensor, indices: Tensor, more: Tensor, begin: int, k: int) -> tuple[Tensor, Tensor]:
    """The k best [Q, k] of those found so far and of `more` [Q, n], the scores of rows `begin` and on."""
    s, i = top(more, k)
    scores, best = top(torch.cat([scores, s], 1), k)
    return scores, torch.cat([indices, i + begin], 1).gather(1, best)


def top(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of each row, or all; the largest alone is faster found by max."""
    return scores.max(1, keepdim=True) if k == 1 else scores.topk(min(k, scores.shape[1]), dim=1)


def choose_faiss_kernel() -> None:
    """To be called before FAISS is imported: its wheel's OpenBLAS takes the slowest kernel on a CPU unknown to it."""
    own = subprocess.run(
        [sys.executable, "-c", "from benchmarks.speed.search_rivals import faiss_blas; print(faiss_blas())"],
        capture_output=True,
        text=True,
        check=True,
    )
    if kernel := better_kernel(own.stdout, harness.isas()):
        os.environ["OPENBLAS_CORETYPE"] = kernel


def better_kernel(own: str, isas: list[str]) -> str | None:
    """The kernel to ask OpenBLAS for, where the one that it picked is that of a CPU of 2004."""
    if "Prescott" not in own or not isas:
        return None
    return "SkylakeX" if any(isa.startswith("avx512") for isa in isas) else "Haswell"


def faiss_blas() -> str:
    """The BLAS that FAISS loaded and the kernel it picked."""
    import faiss  # noqa: F401
    from threadpoolctl import threadpool_info

    pools = [p for p in threadpool_info() if p["user_api"] == "blas" and "faiss" in p["filepath"]]
    return "; ".join(f"{p['internal_api']} {p['version']} {p.get('architecture', '')}" for p in pools) or "unknown"
