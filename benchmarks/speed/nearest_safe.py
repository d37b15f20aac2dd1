"""nearest_safe against the best PyTorch paths, FAISS, NumKong and an int8 product.

    python -m benchmarks.speed.nearest_safe --faiss --numkong           Q 1, 16 and 1,024, N 100,000
    python -m benchmarks.speed.nearest_safe --cases 1024x1000000        10 GB of memory
    python -m benchmarks.speed.nearest_safe --curves                    Q, N, d and k varied one at a time
    python -m benchmarks.speed.nearest_safe --sweep --json sweep.json   the grid, a few seconds a cell at most

`ours_packed_avx2` and the like force that instruction set; the rest use the file's. `int8_mm` is torch._int_mm of int8
queries and rows: the cost of a screen's products alone. It bounds no error, selects nothing and scores nothing exactly,
so no search can be built from it at this price.
"""

from __future__ import annotations

import argparse
import itertools
import os
from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec

import torch
from torch.nn.functional import normalize

import saferclip_fast as sf
from benchmarks import harness
from benchmarks.speed import search_rivals

CHUNKS = (512, 1024, 2048, 8192)
FEW = 64  # queries: the product may be faster with the bank's rows first, which gives every core some
SWEEP_N, SWEEP_D = (64, 1000, 30_000, 300_000), (64, 512, 768, 1000, 1024)
SWEEP_Q, SWEEP_K = (1, 8, 64, 1024), (1, 5, 100)
COMPILED = {(64, 768), (1000, 768), (30_000, 768)}  # (N, d) of the sweep that also run under torch.compile, k = 5
BASE = {"data": "clip_like", "Q": 512, "N": 100_000, "d": 768, "k": 8}
VARIED = {"Q": (1, 8, 64), "N": (100, 1000, 10_000), "d": (64, 256, 1536), "k": (1, 64, 256)}
WANTED = 0.9  # of the best PyTorch path, in every cell of the sweep
PANORAMA_QUERIES = 64  # it reads the bank once a query: seconds a call at 1,024
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
    return search_rivals.top(query @ bank.T, k)


def bank_first(query, bank, k):
    return search_rivals.top((bank @ query.T).T.contiguous(), k)


def chunked(query, bank, k, chunk):
    scores = query.new_empty((len(query), 0))
    indices = torch.empty((len(query), 0), dtype=torch.int64)
    for begin in range(0, len(bank), chunk):
        part = query @ bank[begin : begin + chunk].T
        scores, indices = search_rivals.best_of(scores, indices, part, begin, k)
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
        found["eager"] = lambda: at_once(unit, bank, k)
        if compiled:
            torch._dynamo.reset()  # each case is compiled for its own shapes
            fast = torch.compile(at_once, dynamic=False)
            found["compiled"] = lambda: fast(unit, bank, k)
    if len(query) <= FEW:
        found["eager_bank_first"] = lambda: bank_first(unit, bank, k)
    for chunk in (c for c in CHUNKS if c < len(bank)):
        found[f"chunked_{chunk}"] = lambda chunk=chunk: chunked(unit, bank, k, chunk)
    return found


def forced_paths(query, packed, k) -> dict[str, Callable[[], object]]:
    """Ours with every other instruction set that this CPU has; a packed bank is the same for all of them."""

    def search(isa: str) -> object:
        with harness.forced(isa):
            return sf.nearest_safe(query, packed, k, check=False)

    return {f"ours_packed_{isa}": partial(search, isa) for isa in harness.isas() if isa != harness.isa()}


def others(args: argparse.Namespace, cases: list[dict]) -> dict[str, Callable[[torch.Tensor], search_rivals.Search]]:
    """How to build the searches of other libraries that the cases of one bank are compared with."""
    found = {"int8_mm": search_rivals.int8_mm}
    if args.faiss:
        found["faiss"] = search_rivals.faiss_flat
        if search_rivals.has_panorama() and any(with_panorama(args, case) for case in cases):
            found["faiss_panorama"] = search_rivals.faiss_panorama
    if args.numkong:
        found["numkong"] = search_rivals.numkong
    return found


def with_panorama(args: argparse.Namespace, case: dict) -> bool:
    return args.panorama or case["Q"] <= PANORAMA_QUERIES


def sweep(dims: list[int], compiling: bool, results: harness.Results) -> None:
    """Every cell of the grid, within two seconds each but for the first round."""
    for n, d in itertools.product(SWEEP_N, dims):
        cells = [{"data": "gaussian", "Q": q, "N": n, "d": d, "k": k} for q in SWEEP_Q for k in SWEEP_K if k <= n]
        if all(map(results.has, cells)):
            continue
        bank = gaussian(n, d)
        packed = packed_bank(bank)
        for cell in cells:
            if not results.has(cell):
                compiled = compiling and (n, d) in COMPILED and cell["k"] == 5
                candidates = paths(torch.randn(cell["Q"], d), bank, packed, cell["k"], compiled)
                if n == max(SWEEP_N):  # seconds a call, so one chunk size: taken to be near the best, not checked
                    candidates = one_chunk(candidates)
                results.add(cell, harness.measure(candidates, rounds=3, budget_s=2.0, memory=False))


def one_chunk(candidates: dict[str, Callable[[], object]]) -> dict[str, Callable[[], object]]:
    left_out = {f"chunked_{chunk}" for chunk in CHUNKS if chunk != 8192}
    return {name: path for name, path in candidates.items() if name not in left_out}


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
        compiled = sum("compiled_ms" in r for r in rows)
        print(f"the worst unpacked: {worst['torch/ours']:.2f}; {compiled} of the cells also ran under torch.compile")


def measure(wanted: list[dict], args: argparse.Namespace, results: harness.Results) -> None:
    """The cases, in the order of their banks, so that each bank is made once."""
    missing = [case for case in wanted if not results.has(case)]
    for (kind, n, d), group in itertools.groupby(missing, key=lambda case: (case["data"], case["N"], case["d"])):
        cases = list(group)
        torch.manual_seed(0)
        queries = max(case["Q"] for case in cases)
        bank = DATA[kind](n + queries, d)
        query, bank = bank[:queries].clone(), bank[queries:]
        packed = packed_bank(bank)
        searches = {} if args.curves else {name: build(bank) for name, build in others(args, cases).items()}
        for case in cases:
            q, k = query[: case["Q"]], case["k"]
            candidates = paths(q, bank, packed, k, not (args.no_compile or args.curves))
            if args.curves:
                candidates = one_chunk(candidates)
            else:
                candidates |= forced_paths(q, packed, k)
            unit = normalize(q, dim=1)
            for name, search in searches.items():
                if name != "faiss_panorama" or with_panorama(args, case):
                    candidates[name] = partial(search, unit, k)
            results.add(case, harness.measure(candidates, args.rounds, args.budget))


def faiss_notes() -> dict[str, str]:
    """Facts of the file: what FAISS computes with."""
    search_rivals.choose_faiss_kernel()
    panorama = search_rivals.PANORAMA.format(d=768) if search_rivals.has_panorama() else "not in this FAISS"
    return {"faiss_blas": search_rivals.faiss_blas(), "faiss_panorama": panorama}


def numbers(text: str) -> list[int]:
    return [int(x) for x in text.split(",")]


def sizes(text: str) -> list[tuple[int, ...]]:
    return [tuple(map(int, case.split("x"))) for case in text.split(",")]


def main() -> None:
    parser = harness.parser(__doc__, rounds=5, budget_s=60.0)
    parser.add_argument("--sweep", action="store_true", help="the whole grid; prints the cells below 0.9 of PyTorch")
    parser.add_argument("--curves", action="store_true", help="scaling curves; without torch.compile, one chunk size")
    parser.add_argument("--cases", type=sizes, default="1x100000,16x100000,1024x100000", help="QxN,QxN,...")
    parser.add_argument("--ks", type=numbers, default="1,8,32")
    parser.add_argument("--data", type=lambda text: text.split(","), default="gaussian,clip_like")
    parser.add_argument("--dims", type=numbers, default=",".join(map(str, SWEEP_D)), help="sweep only")
    parser.add_argument("--faiss", action="store_true", help="also FAISS (pip install faiss-cpu threadpoolctl)")
    parser.add_argument("--numkong", action="store_true", help="also NumKong (pip install numkong)")
    parser.add_argument(
        "--panorama", action="store_true", help=f"FAISS's Panorama for more than {PANORAMA_QUERIES} queries, too"
    )
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    args = parser.parse_args()
    if unknown := set(args.data) - set(DATA):
        parser.error(f"--data {', '.join(sorted(unknown))} is unknown; use {', '.join(DATA)}")
    if args.faiss and (found := sorted(BLAS_SETTINGS & set(os.environ))):
        parser.error(
            f"{', '.join(found)} would choose FAISS's BLAS kernel: run it as env -u {' -u '.join(found)} python ..."
        )
    if args.faiss and any(find_spec(name) is None for name in ("faiss", "threadpoolctl")):
        parser.error("--faiss needs two packages more: pip install faiss-cpu threadpoolctl")
    if args.numkong and find_spec("numkong") is None:
        parser.error("--numkong needs a package more: pip install numkong")
    notes = faiss_notes() if args.faiss else {}
    name = "sweep" if args.sweep else "curves" if args.curves else "cases"
    results = harness.Results(f"nearest_safe, {name}", args.json, **notes)
    if args.sweep:
        sweep(args.dims, not args.no_compile, results)
        print_below(results.rows)
        return
    wanted = harness.varied(BASE, VARIED)
    if args.curves:
        wanted.sort(key=lambda case: (case["N"], case["d"]))
    else:
        listed = itertools.product(args.data, args.cases, args.ks)
        wanted = [{"data": kind, "Q": q, "N": n, "d": 768, "k": k} for kind, (q, n), k in listed]
    measure(wanted, args, results)


if __name__ == "__main__":
    main()
