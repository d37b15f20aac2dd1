"""nearest_safe against the best PyTorch paths (and FAISS with --faiss).

    python benchmarks/nearest_safe.py --faiss                     Q 1,024 and 4,096, N 100,000
    python benchmarks/nearest_safe.py --cases 1024x1000000        10 GB of memory
    python benchmarks/nearest_safe.py --sweep --json sweep.json   the grid, a few seconds a cell at most

Ratios are of medians, interleaved in one process; above 1 means that nearest_safe is faster. --json is written after
every case, and a case that is there already is not measured again.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import torch
from compare import extra_memory, machine, medians, print_row
from torch.nn.functional import normalize

import saferclip_fast as sf

CHUNKS = (2048, 8192, 32768)
SWEEP_N, SWEEP_D = (64, 1000, 30_000, 300_000), (64, 512, 768, 1000, 1024)
SWEEP_Q, SWEEP_K = (1, 8, 64, 1024), (1, 5, 100)
COMPILED = {(64, 768), (1000, 768), (30_000, 768)}  # (N, d) of the sweep that also run under torch.compile, k = 5
WANTED = 0.9  # of the best PyTorch path, in every cell of the sweep
ROWS_AT_ONCE = 50_000  # of the data while it is made
BLAS_SETTINGS = {"OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE"}  # keep FAISS's BLAS from its best kernel


def gaussian(n: int, d: int) -> torch.Tensor:
    rows = torch.empty(n, d)
    for part in rows.split(ROWS_AT_ONCE):
        part.copy_(normalize(torch.randn(part.shape), dim=1))
    return rows


def clip_like(n: int, d: int) -> torch.Tensor:
    """Unit rows with a common mean direction, a decaying spectrum, clusters and near-duplicates."""
    spectrum = torch.arange(1, d + 1).float().pow(-0.35)
    centers = torch.randn(max(n // 50, 1), d) * spectrum
    common = 2.5 * spectrum.norm() * normalize(torch.randn(d), dim=0) / 2
    rows = torch.empty(n, d)
    for part in rows.split(ROWS_AT_ONCE):
        part.copy_(centers[torch.randint(len(centers), (len(part),))])
        part += 0.6 * torch.randn(part.shape) * spectrum + common
    twins = torch.randperm(n)[: n // 20]
    rows[twins] = rows[twins.roll(1)] + 0.01 * torch.randn(len(twins), d)
    for part in rows.split(ROWS_AT_ONCE):
        part.copy_(normalize(part, dim=1))
    return rows


DATA = {"gaussian": gaussian, "clip_like": clip_like}


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


def packed_bank(bank: torch.Tensor) -> sf.SafeBank:
    return sf.SafeBank.from_unit(bank, bank, {}).pack()


def paths(query, bank, packed, k, compiled: bool) -> dict[str, Callable[[], object]]:
    found: dict[str, Callable[[], object]] = {
        "ours": lambda: sf.nearest_safe(query, bank, k, check=False),
        "ours_packed": lambda: sf.nearest_safe(query, packed, k, check=False),
    }
    unit = normalize(query, dim=1)
    if len(query) * len(bank) <= 5e8:
        found["mm_topk"] = lambda: at_once(unit, bank, k)
        if compiled:
            fast = torch.compile(at_once, dynamic=False)
            found["compiled_mm_topk"] = lambda: fast(unit, bank, k)
    for chunk in (c for c in CHUNKS if c < len(bank)):
        found[f"chunked_{chunk}"] = lambda chunk=chunk: chunked(unit, bank, k, chunk)
    return found


def row(case: dict, times: dict[str, float], **more) -> dict:
    torch_times = {name: t for name, t in times.items() if not name.startswith(("ours", "faiss"))}
    best = min(torch_times, key=lambda name: torch_times[name])
    ours = {name: t for name, t in times.items() if name.startswith("ours")}
    ratios = {f"torch/{name}": torch_times[best] / t for name, t in ours.items()}
    if "faiss" in times:
        ratios |= {f"faiss/{name}": times["faiss"] / t for name, t in ours.items()}
    ms = {f"{name}_ms": t * 1e3 for name, t in times.items() if name.startswith(("ours", "faiss"))}
    return {**case, **ms, "best_torch": best, "best_torch_ms": torch_times[best] * 1e3, **ratios, **more}


def faiss_path(query, bank, k):
    import faiss

    index = faiss.IndexFlatIP(bank.shape[1])
    index.add(bank.numpy())
    unit = normalize(query, dim=1).numpy()
    return lambda: index.search(unit, k)


def faiss_blas() -> str:
    """The BLAS that FAISS loaded and the kernel it picked."""
    import faiss  # noqa: F401
    from threadpoolctl import threadpool_info

    pools = [p for p in threadpool_info() if p["user_api"] == "blas" and "faiss" in p["filepath"]]
    return "; ".join(f"{p['internal_api']} {p['version']} {p.get('architecture', '')}" for p in pools) or "unknown"


class Results:
    """The measured rows, in a JSON file as well: what is in it is not measured again."""

    KEYS = ("data", "Q", "N", "d", "k")

    def __init__(self, title: str, path: str | None, **notes: object) -> None:
        self.title, self.path, self.notes = title, Path(path) if path else None, {**machine(), **notes}
        self.rows: list[dict] = []
        if self.path is not None and self.path.exists():
            old = json.loads(self.path.read_text())
            if old.get("title") != title or old.get("machine") != self.notes:
                sys.exit(
                    f"{path} holds another measurement ({old.get('title')}, {old.get('machine')}); name a new file"
                )
            self.rows = old["rows"]

    def has(self, case: dict) -> bool:
        return any(all(r[key] == case[key] for key in self.KEYS) for r in self.rows)

    def add(self, found: dict) -> None:
        self.rows.append(found)
        print_row(found)
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            part = self.path.with_suffix(".part")
            part.write_text(
                json.dumps({"title": self.title, "machine": self.notes, "rows": self.rows}, indent=1) + "\n"
            )
            part.replace(self.path)


def sweep(dims: list[int], compiling: bool, results: Results) -> None:
    """Every cell of the grid, within two seconds each but for the first round."""
    for n, d in itertools.product(SWEEP_N, dims):
        cells = [{"data": "gaussian", "Q": q, "N": n, "d": d, "k": k} for q in SWEEP_Q for k in SWEEP_K]
        if all(results.has(cell) or cell["k"] > n for cell in cells):
            continue
        bank = gaussian(n, d)
        packed = packed_bank(bank)
        for cell in cells:
            q, k = cell["Q"], cell["k"]
            if k > n:
                print(f"  skipped: N={n} d={d} Q={q} k={k}, more neighbors than rows")
            elif not results.has(cell):
                compiled = compiling and (n, d) in COMPILED and k == 5
                candidates = paths(torch.randn(q, d), bank, packed, k, compiled)
                if n == max(SWEEP_N):  # seconds a call, so one chunk size: taken to be near the best, not checked
                    candidates = {
                        name: f for name, f in candidates.items() if name not in ("chunked_2048", "chunked_32768")
                    }
                results.add(row(cell, medians(candidates, rounds=3, budget_s=2.0), compiled=compiled))


def below(rows: list[dict]) -> Iterator[tuple[dict, float, float]]:
    for r in rows:
        if min(r["torch/ours"], r["torch/ours_packed"]) < WANTED:
            yield r, r["torch/ours"], r["torch/ours_packed"]


def print_below(rows: list[dict]) -> None:
    found = list(below(rows))
    print(f"{len(rows)} cells, {len(found)} of them below {WANTED} of the best PyTorch path (packed or not)")
    for r, plain, packed in found:
        print(f"  Q={r['Q']} N={r['N']} d={r['d']} k={r['k']}: {plain:.2f}, packed {packed:.2f} ({r['best_torch']})")
    worst = min(rows, key=lambda r: r["torch/ours"], default=None)
    if worst is not None:
        compiled = sum(r["compiled"] for r in rows)
        print(f"the worst unpacked: {worst['torch/ours']:.2f}; {compiled} of the cells also ran under torch.compile")


def cases(args: argparse.Namespace, results: Results) -> None:
    for (q, n), kind in itertools.product(args.cases, args.data):
        wanted = [{"data": kind, "Q": q, "N": n, "d": 768, "k": k} for k in args.ks]
        wanted = [case for case in wanted if not results.has(case)]
        if not wanted:
            continue
        bank = DATA[kind](n + q, 768)
        query, bank = bank[:q].clone(), bank[q:]
        sf.nearest_safe(query[:32], bank[:1000], 1, check=False)  # threads and code are in memory
        memory = {k: extra_memory(partial(sf.nearest_safe, query, bank, k, check=False)) for k in args.ks}
        packed = packed_bank(bank)
        for case in wanted:
            k = case["k"]
            candidates = paths(query, bank, packed, k, not args.no_compile)
            if args.faiss:
                candidates["faiss"] = faiss_path(query, bank, k)
            times = medians(candidates, args.rounds, budget_s=args.budget)
            results.add(row(case, times, extra_MiB=memory[k] / 2**20))


def numbers(text: str) -> list[int]:
    return [int(x) for x in text.split(",")]


def sizes(text: str) -> list[tuple[int, ...]]:
    return [tuple(map(int, case.split("x"))) for case in text.split(",")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sweep", action="store_true", help="the whole grid; prints the cells below 0.9 of PyTorch")
    parser.add_argument("--cases", type=sizes, default="1024x100000,4096x100000", help="QxN,QxN,...")
    parser.add_argument("--ks", type=numbers, default="1,8,32")
    parser.add_argument("--data", type=lambda text: text.split(","), default="gaussian,clip_like")
    parser.add_argument("--dims", type=numbers, default=",".join(map(str, SWEEP_D)), help="sweep only")
    parser.add_argument(
        "--faiss", action="store_true", help="also faiss-cpu's IndexFlatIP (pip install faiss-cpu threadpoolctl)"
    )
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--budget", type=float, default=60.0, help="seconds a case, after which no round begins")
    parser.add_argument("--json", help="file of the results")
    args = parser.parse_args()
    if unknown := set(args.data) - set(DATA):
        parser.error(f"--data {', '.join(sorted(unknown))} is unknown; use {', '.join(DATA)}")
    if args.faiss and (found := sorted(BLAS_SETTINGS & set(os.environ))):
        parser.error(
            f"{', '.join(found)} would choose FAISS's BLAS kernel: run it as env -u {' -u '.join(found)} python ..."
        )
    if args.faiss and any(find_spec(name) is None for name in ("faiss", "threadpoolctl")):
        parser.error("--faiss needs two packages more: pip install faiss-cpu threadpoolctl")
    torch.manual_seed(0)
    notes = {}
    if args.faiss:
        notes["faiss_blas"] = faiss_blas()
        print(f"FAISS's BLAS: {notes['faiss_blas']}")
    title = "nearest_safe: the sweep" if args.sweep else "nearest_safe: time of the best PyTorch path over ours"
    results = Results(title, args.json, **notes)
    print(title)
    if args.sweep:
        sweep(args.dims, not args.no_compile, results)
        print_below(results.rows)
    else:
        cases(args, results)


if __name__ == "__main__":
    main()
