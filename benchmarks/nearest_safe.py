"""nearest_safe against the best PyTorch paths (and FAISS with --faiss): python benchmarks/nearest_safe.py [--sweep].

Ratios are of medians, interleaved in one process; above 1 means that nearest_safe is faster.
"""

from __future__ import annotations

import argparse
import itertools

import torch
from compare import medians, report
from torch.nn.functional import normalize

import saferclip_fast as sf

CHUNKS = (2048, 8192, 32768)


def gaussian(n: int, d: int) -> torch.Tensor:
    return normalize(torch.randn(n, d), dim=1)


def clip_like(n: int, d: int) -> torch.Tensor:
    """Unit rows with a common mean direction, a decaying spectrum, clusters and near-duplicates."""
    spectrum = torch.arange(1, d + 1).float().pow(-0.35)
    centers = torch.randn(max(n // 50, 1), d) * spectrum
    rows = centers[torch.randint(len(centers), (n,))] + 0.6 * torch.randn(n, d) * spectrum
    rows += 2.5 * spectrum.norm() * normalize(torch.randn(d), dim=0) / 2
    twins = torch.randperm(n)[: n // 20]
    rows[twins] = rows[twins.roll(1)] + 0.01 * torch.randn(len(twins), d)
    return normalize(rows, dim=1)


def at_once(query, bank, k):
    return (query @ bank.T).topk(k, dim=1)


def chunked(query, bank, k, chunk):
    scores = query.new_empty((len(query), 0))
    indices = torch.empty((len(query), 0), dtype=torch.int64)
    for begin in range(0, len(bank), chunk):
        s, i = (query @ bank[begin : begin + chunk].T).topk(min(k, len(bank) - begin), dim=1)
        scores, best = torch.cat([scores, s], 1).topk(min(k, scores.shape[1] + s.shape[1]), dim=1)
        indices = torch.cat([indices, i + begin], 1).gather(1, best)
    return scores, indices


def paths(query, bank, k, compiled: bool):
    packed = sf.SafeBank.from_unit(bank, bank, {}).pack()
    found = {
        "ours": lambda: sf.nearest_safe(query, bank, k, check=False),
        "ours_packed": lambda: sf.nearest_safe(query, packed, k, check=False),
    }
    unit = normalize(query, dim=1)
    if len(query) * len(bank) <= 5e8:
        found["mm_topk"] = lambda: at_once(unit, bank, k)
        if compiled:
            fast = torch.compile(at_once, dynamic=False)
            found["compiled_mm_topk"] = lambda: fast(unit, bank, k)
    for chunk in CHUNKS:
        if chunk < len(bank):
            found[f"chunked_{chunk}"] = lambda chunk=chunk: chunked(unit, bank, k, chunk)
    return found


def row(kind, q, n, d, k, times, **more):
    torch_times = {name: t for name, t in times.items() if not name.startswith(("ours", "faiss"))}
    best = min(torch_times, key=torch_times.get)
    ratios = {f"torch/{name}": torch_times[best] / t for name, t in times.items() if name.startswith("ours")}
    if "faiss" in times:
        ratios |= {f"faiss/{name}": times["faiss"] / t for name, t in times.items() if name.startswith("ours")}
    ms = {f"{name}_ms": t * 1e3 for name, t in times.items() if name.startswith(("ours", "faiss"))}
    return {
        "data": kind,
        "Q": q,
        "N": n,
        "d": d,
        "k": k,
        **ms,
        "best_torch": best,
        "best_torch_ms": torch_times[best] * 1e3,
        **ratios,
        **more,
    }


def faiss_path(query, bank, k):
    import faiss

    index = faiss.IndexFlatIP(bank.shape[1])
    index.add(bank.numpy())
    unit = normalize(query, dim=1).numpy()
    return lambda: index.search(unit, k)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sweep", action="store_true", help="the whole grid, never slower than 0.9 of PyTorch")
    parser.add_argument("--cases", default="1024x100000,4096x100000", help="QxN,QxN,...")
    parser.add_argument("--ks", default="1,8,32")
    parser.add_argument("--data", default="gaussian,clip_like")
    parser.add_argument("--dims", default="64,512,768,1000,1024", help="sweep only")
    parser.add_argument("--faiss", action="store_true")
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json")
    args = parser.parse_args()
    torch.manual_seed(0)
    rows = []
    if args.sweep:
        grid = itertools.product((64, 1000, 30000, 300000), map(int, args.dims.split(",")))
        for n, d in grid:
            bank = gaussian(n, d)
            for q, k in itertools.product((1, 8, 64, 1024), (1, 5, 100)):
                if k > n:
                    continue
                query = torch.randn(q, d)
                times = medians(paths(query, bank, k, compiled=False), 3, budget_s=4)
                rows.append(row("gaussian", q, n, d, k, times))
                print(rows[-1], flush=True)
    else:
        for case, kind in itertools.product(args.cases.split(","), args.data.split(",")):
            q, n = map(int, case.split("x"))
            rows_made = {"gaussian": gaussian, "clip_like": clip_like}[kind](n + q, 768)
            query, bank = rows_made[:q].contiguous(), rows_made[q:].contiguous()
            for k in map(int, args.ks.split(",")):
                candidates = paths(query, bank, k, not args.no_compile)
                if args.faiss:
                    candidates["faiss"] = faiss_path(query, bank, k)
                rows.append(row(kind, q, n, 768, k, medians(candidates, args.rounds, budget_s=60)))
    report("nearest_safe: time of the best PyTorch path over ours", rows, args.json)


if __name__ == "__main__":
    main()
