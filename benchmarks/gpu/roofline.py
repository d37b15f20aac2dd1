"""Predicted cost of the CUDA kernels: python benchmarks/roofline.py prints the tables of docs/gpu-kernels.md.

Bytes are those of device memory, operations count a multiply-add as two. The counts of multiply-adds and of bytes that
a kernel asks for are checked against the SIMT executor's counters (tests/backends/cuda/test_roofline.py); the times are
predictions, no GPU has measured them.
"""

from __future__ import annotations

from dataclasses import dataclass

TILE = 128  # rows of a tile of the matrix core
SLICE = 64  # bytes of depth of a pipeline stage
RESCORED = 4  # rows scored again per query and neighbor: benchmarks/speed/screen_survivors.py, fp16, N = 100,000
# Triton's screen of groups: its tile, and rows scored per query, the largest of the same script's three banks.
GROUP_TILE = (128, 256, 64)
GROUP_SCORED = {1: 2.4, 8: 20.2, 16: 43.7, 32: 97.6}
# Issue slots of a warp and tile beside its products, from the compiled code: minima, maxima and logic take two each on
# these chips, products one, and about 150 others. test_compile.py holds the counts.
GROUP_SLOTS = 2 * (432 + 150) + 128 + 150


@dataclass(frozen=True)
class Gpu:
    """Data-sheet peaks of the SXM parts, dense."""

    name: str
    multiprocessors: int
    memory: float  # bytes/s
    half: float  # bf16/fp16 operations/s on tensor cores
    fp32: float
    fp64: float
    matrix_fraction: float  # of the tensor-core peak that published mma.sync kernels reach
    library_fraction: float  # of that peak that the vendor's products reach
    cache: int  # bytes of L2
    clock: float  # at the peak of the data sheet
    tma_fraction: float = 0.0  # of the tensor-core peak that Triton's products through TMA reach; 0: no TMA
    memory_fraction: float = 0.85


GPUS = (
    Gpu(
        "A100", 108, 2.04e12, 312e12, 19.5e12, 9.7e12, 0.73, 0.85, 40 << 20, 1.41e9
    ),  # FlashAttention-2 on an A100: 230 of 312
    # FlashAttention-2 (mma.sync) on an H100. Triton's persistent TMA matmul, 8,192 x 8,192 x 4,096: 68 % of the fp8
    # peak in triton-lang/triton#5461, 666 TFLOP/s in fp16 in meta-pytorch/tritonbench#894 (which names no chip).
    Gpu("H100", 132, 3.35e12, 989e12, 67e12, 34e12, 0.35, 0.71, 50 << 20, 1.83e9, 0.67),
    Gpu(
        "B200", 148, 7.7e12, 2250e12, 75e12, 37e12, 0.18, 0.70, 126 << 20, 1.85e9, 0.5
    ),  # assumptions: mma.sync as fast as on an H100, and half of the peak through TMA
)


@dataclass(frozen=True)
class Cost:
    """Bytes and operations of one call; operations by the unit that does them."""

    bytes: float
    half: float = 0.0
    fp32: float = 0.0
    fp64: float = 0.0
    library: float = 0.0  # by the vendor's products, in 16 bits
    after: float = 0.0  # bytes of passes between products, which nothing hides
    tma: float = 0.0  # in 16 bits, by Triton through TMA
    slots: float = 0.0  # issue slots of warps that wait for such products, of the whole chip

    def seconds(self, gpu: Gpu, real: bool) -> float:
        """The slowest of memory and each unit, at 100 % or at the fraction that is reached; then `after`."""
        matrix, memory = (gpu.matrix_fraction, gpu.memory_fraction) if real else (1.0, 1.0)
        tma = self.tma / (gpu.half * (gpu.tma_fraction if real else 1.0)) if self.tma else 0.0
        return self.after / (gpu.memory * memory) + max(
            self.bytes / (gpu.memory * memory),
            tma + self.slots / (4 * gpu.multiprocessors * gpu.clock),
            self.library / (gpu.half * (gpu.library_fraction if real else 1.0)),
            self.half / (gpu.half * matrix),
            self.fp32 / (gpu.fp32 * (0.7 if real else 1.0)),
            self.fp64 / (gpu.fp64 * (0.7 if real else 1.0)),
        )


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


# ---- Counts that the executor checks.
def tile_products(rows: int, columns: int, depth: int, size: int) -> int:
    """Multiply-adds of A B^T in tiles, padding included; `size` bytes an element."""
    depth = ceil_div(depth * size, SLICE) * SLICE // size
    return ceil_div(rows, TILE) * ceil_div(columns, TILE) * TILE * TILE * depth


def group_products(rows: int, columns: int, depth: int, tile: tuple[int, int, int] = (128, 256, 64)) -> int:
    """Multiply-adds of Triton's screen of groups, padding included: each product once."""
    padded = [ceil_div(count, size) * size for count, size in zip((rows, columns, depth), tile, strict=True)]
    return padded[0] * padded[1] * padded[2]


def tile_bytes(rows: int, columns: int, row_bytes: int) -> int:
    """Bytes that the tiles bring into shared memory, mostly from L2: each operand once per tile of the other."""
    return (rows * ceil_div(columns, TILE) + columns * ceil_div(rows, TILE)) * row_bytes


def retarget_loads(batch: int, dim: int, k: int, size: int, bank_size: int) -> int:
    """Bytes that retarget_loss asks for with gradients; dim a multiple of 8."""
    passes = 2 * batch * dim * 4 * size  # text, image and two frozen rows, in both passes
    gathered = batch * 2 * k * dim * bank_size
    lists = batch * (dim // 8) * 2 * k * (8 + 4)  # neighbor and weight, per eight elements
    return passes + gathered + lists + batch * 32 * 16 + batch * 16  # row weights by lane, row terms


def preservation_products(batch: int, dim: int, size: int) -> int:
    """Multiply-adds with both InfoNCE terms and gradients: S for two lse and the weights, then weights times rows."""
    return 2 * (3 * tile_products(batch, batch, dim, size) + tile_products(batch, dim, batch, size))


# ---- Costs of a call.
def search(gpu: Gpu, batch: int, rows: int, dim: int, k: int) -> Cost:
    """nearest_safe of fp32 rows against a packed bank; a wave of blocks reads the fp16 copy once, through L2."""
    waves = ceil_div(batch, TILE * 2 * gpu.multiprocessors)
    bank = waves * rows * (2 * dim + 16)
    again = batch * RESCORED * k * dim
    lists = batch * 16 * 2 * (3 * TILE + RESCORED * k)
    return Cost(
        bytes=bank + batch * dim * (4 + 2 + 2 + 4) + lists + batch * k * 12,
        half=2 * tile_products(batch, rows, dim, 2),
        fp64=2 * again,
        after=4 * again,  # the rows that are scored again, by a kernel of its own
    )


def group_search(batch: int, rows: int, dim: int, k: int) -> Cost:
    """nearest_safe of fp32 rows against a packed bank by Triton's screen of groups, and the passes after it.

    The groups' best and second are written beside the products; then the best are read twice, the second once, and the
    listed rows, which lie anywhere in the bank.
    """
    tiles = ceil_div(batch, GROUP_TILE[0]) * ceil_div(rows, GROUP_TILE[1])
    groups = batch * 8 * ceil_div(rows, GROUP_TILE[1])
    listed = batch * GROUP_SCORED[k]
    return Cost(
        bytes=rows * (2 * dim + 16) + 8 * groups,
        tma=2 * group_products(batch, rows, dim),
        slots=8 * GROUP_SLOTS * tiles,
        fp64=2 * listed * dim,
        after=12 * groups + listed * (4 * dim + 24) + batch * (dim * (4 + 4 + 4 + 2) + 12 * k),
    )


def plain_search(batch: int, rows: int, dim: int, k: int) -> Cost:
    """Chunked fp32 product and topk in PyTorch: the scores are written and read once."""
    return Cost(bytes=2 * 4 * batch * rows + 4 * dim * (batch + rows), fp32=2 * batch * rows * dim)


def retarget(batch: int, dim: int, k: int, size: int = 2, bank_size: int = 4) -> Cost:
    """Device memory of retarget_loss with gradients: the second pass over the rows hits L1/L2."""
    moved = batch * dim * (4 * size + 2 * k * bank_size + 2 * size) + batch * (k * 12 + 48)
    return Cost(bytes=moved, fp32=2 * batch * dim * (10 + 2 * k + 12))


def plain_retarget(batch: int, dim: int, k: int, size: int = 2, bank_size: int = 4) -> Cost:
    """Eager autograd: gathers written and read (k rows, and their sum), four normalizations (read twice, written),
    six products and as many reductions, and their backward (each saved row read, each gradient written and added)."""
    row = batch * dim
    gathers = 2 * (2 * k * bank_size + (k > 1) * (k + 1) * bank_size)
    normalize = 4 * 3 * size
    products = 6 * (2 * size + 2 * size)
    backward = 6 * (2 * size + 2 * size) + 2 * 4 * size
    return Cost(bytes=row * (gathers + normalize + products + backward))


def chunked_preservation(gpu: Gpu, batch: int, dim: int, size: int = 2, mib: float = 256.0) -> Cost:
    """preservation_loss in chunks of rows: 3 products a term, or 2 where S fits `mib` and is kept.

    S is read three times and the weights written, between products: at twice the memory's rate while y and a chunk of
    S stay in L2, an assumption, else at the memory's. Beyond L2 each product reads y and writes S or reads the weights.
    """
    kept = 4 * batch * batch <= mib * 2**20
    products = 2 if kept else 3
    within, beyond = (limit // (4 * batch) // 128 * 128 for limit in (gpu.cache // 2, 256 << 20))
    chunk = within if within >= 256 else max(256, beyond)
    cached = batch * (dim * size + 4 * chunk) <= gpu.cache
    streams = products * ceil_div(batch, chunk) * batch * dim * size + batch * batch * (4 * (products - 1) + size)
    passes = 2 * batch * batch * (3 * 4 + size)
    return Cost(
        bytes=2 * (8 * batch * batch * kept + streams * (not cached)) + 28 * batch * dim * size,
        library=2 * products * 2 * batch * batch * dim,
        after=passes / 2 if cached else passes,
    )


def preservation(batch: int, dim: int, size: int = 2) -> Cost:
    """preservation_loss in CUDA C++, in bf16; the weights of a chunk are written and read once."""
    operations = 2 * preservation_products(batch, dim, size)
    moved = 2 * (batch * batch * size * 2 + batch * dim * (8 * size + 8)) + 4 * batch * dim * size
    return Cost(bytes=moved, half=operations)


def plain_preservation(batch: int, dim: int, size: int = 2) -> Cost:
    """Eager autograd: logits written, read by two log_softmax (fp32), their gradients written, read and summed."""
    operations = 2 * 2 * batch * batch * dim * 2  # S, and the product of the gradient with the frozen rows
    return Cost(bytes=2 * batch * batch * (2 * size + 2 * (2 * 4 + 2 * 4) + 3 * size), half=operations)


def time(seconds: float) -> str:
    return f"{seconds * 1e3:.2f} ms" if seconds >= 1e-4 else f"{seconds * 1e6:.1f} us"


def quantity(x: float, unit: str) -> str:
    for scale, prefix in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M")):
        if x >= scale:
            return f"{x / scale:.3g} {prefix}{unit}"
    return f"{x:.0f} {unit}"


def table(title: str, keys: tuple[str, ...], cases: list[tuple]) -> str:
    """A case is (key values, ours per GPU, plain PyTorch)."""
    head = [*keys, "bytes", "operations", *(f"{g.name}: 100 % / real / PyTorch" for g in GPUS)]
    lines = [f"**{title}**", "", "| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for values, ours, plain in cases:
        first = ours(GPUS[1])
        operations = first.library or first.half or first.tma or first.fp32
        cells = [*(f"{v:,}" for v in values), quantity(first.bytes + first.after, "B"), quantity(operations, "op")]
        for gpu in GPUS:
            cost = ours(gpu)
            if cost.tma and not gpu.tma_fraction:
                cells.append("-")
                continue
            cells.append(
                " / ".join(map(time, (cost.seconds(gpu, False), cost.seconds(gpu, True), plain.seconds(gpu, False))))
            )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def tables(dim: int = 768) -> str:
    batches, banks, ks = (4096, 65536), (100_000, 1_000_000), (1, 8)
    searches = [
        ((b, n, k), lambda gpu, b=b, n=n, k=k: search(gpu, b, n, dim, k), plain_search(b, n, dim, k))
        for b in batches
        for n in banks
        for k in ks
    ]
    grouped = [
        ((b, n, k), lambda gpu, b=b, n=n, k=k: group_search(b, n, dim, k), plain_search(b, n, dim, k))
        for b, n in ((4096, 100_000), (4096, 1_000_000), (65_536, 100_000))
        for k in GROUP_SCORED
    ]
    retargets = [
        ((b, k), lambda gpu, b=b, k=k: retarget(b, dim, k), plain_retarget(b, dim, k)) for b in batches for k in ks
    ]
    preservations = [
        (
            (b,),
            lambda gpu, b=b, chunks=chunks: chunked_preservation(gpu, b, dim) if chunks else preservation(b, dim),
            plain_preservation(b, dim),
        )
        for chunks in (True, False)
        for b in (4096, 16_384, 65_536)
    ]
    return "\n\n".join(
        (
            table("nearest_safe: fp32 queries, packed fp32 bank, d = 768", ("B", "N", "k"), searches),
            table("nearest_safe by Triton's screen of groups, the same", ("B", "N", "k"), grouped),
            table(
                "retarget_loss with gradients: bf16 rows, fp32 bank, d = 768 (N does not matter)", ("B", "k"), retargets
            ),
            table("preservation_loss in chunks (Triton), bf16, d = 768", ("B",), preservations[:3]),
            table("preservation_loss in CUDA C++, bf16, d = 768", ("B",), preservations[3:]),
        )
    )


if __name__ == "__main__":
    print(tables())
