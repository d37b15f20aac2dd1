"""Launch configurations: few, each with a reason, pruned by shape and hardware before any is timed.

The query-side block (BLOCK_ROWS) is not tuned: it is a step function of the batch size (`shared.rows_per_block`), so
the tuning key holds no batch size and a batch that varies neither re-tunes nor recompiles. Timings are cached on disk
by Triton (cache_results), under TRITON_CACHE_DIR.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
from torch import Tensor
from triton import Config

from .shared import INTERPRETED, has_wide_tiles

# Left to itself, ptxas (run by Triton with --regAllocOptLevel=2) stops the screen's kernels at a step of the occupancy
# and spills the last few registers. AMD has no such option.
ROOMY = None if torch.version.hip else 255
KEY_REGISTERS = 64  # a thread's registers for running top-k keys
ACCUMULATORS = {True: 64, False: 32}  # a thread's accumulators; wgmma and tcgen05 (True) leave room for more


def _config(columns: int, width: int, warps: int, stages: int, maxnreg: int | None = None) -> Config:
    tiles = {"BLOCK_COLUMNS": columns, "BLOCK_WIDTH": width}
    return Config(tiles, num_warps=warps, num_stages=stages, maxnreg=maxnreg)


# A tile row is 128 bytes along d (one cache line, and the widest shared-memory swizzle): BLOCK_WIDTH is 64 for half
# precision and 32 for float32, and `fits` keeps those of the dtype.
SCREEN = [
    _config(
        128, 64, warps=8, stages=3, maxnreg=ROOMY
    ),  # most reuse: a loaded byte meets 128 columns; 96 KiB at 128 rows
    _config(64, 64, warps=4, stages=4, maxnreg=ROOMY),  # two programs a multiprocessor: one reduces, one multiplies
    _config(128, 32, warps=8, stages=3, maxnreg=ROOMY),
    _config(64, 32, warps=4, stages=4, maxnreg=ROOMY),
]

# The screen of groups (grouped_screen.py) has one: a tile's bytes meet 128 queries and 256 rows, 128 accumulators a
# thread leave room for what a group needs, and four stages of 48 KiB fill shared memory.
GROUPED_TILE = (16, 64, 16) if INTERPRETED else (128, 256, 64)  # small there, so that several tiles occur
GROUPED = Config(
    dict(zip(("BLOCK_ROWS", "BLOCK_COLUMNS", "BLOCK_WIDTH"), GROUPED_TILE, strict=True)), num_warps=8, num_stages=4
)
GROUPED_QUERIES = 257  # fewer do not fill tiles of 128, and wait for memory rather than for products
GROUPED_ROWS = 4096  # of the bank: fewer do not fill the chip
GROUPED_ROWS_A_NEIGHBOR = 128  # of the bank: four groups, so that few of the best k share one
GROUPED_MOST_ROWS = 1 << 22  # of the bank: 1 MB a query for the groups' values
GROUPED_MOST_WIDTH = 4096  # the bound's r grows with d


def takes_groups(query: Tensor, bank: Tensor, k: int) -> bool:
    """Whether a search goes through the screen of groups: by chip and size, a choice that is predicted, not measured.

    TMA wants rows that begin at a multiple of 16 bytes.
    """
    (rows, width), bank_rows = query.shape, bank.shape[0]
    return (
        has_wide_tiles(query.device)
        and rows >= GROUPED_QUERIES
        and max(GROUPED_ROWS, GROUPED_ROWS_A_NEIGHBOR * k) <= bank_rows <= GROUPED_MOST_ROWS
        and width % 8 == 0
        and width <= GROUPED_MOST_WIDTH
        and bank.data_ptr() % 16 == 0
    )


def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that one program may use on this device."""
    index = device.index if device.index is not None else torch.cuda.current_device()
    return triton.runtime.driver.active.utils.get_device_properties(index)["max_shared_mem"]


def fits(config: Config, block_rows: int, itemsize: int, keep: int, limit: int, wide: bool) -> bool:
    """Whether a configuration suits the dtype, and its tiles, keys and accumulators the chip."""
    columns, width = (config.kwargs[name] for name in ("BLOCK_COLUMNS", "BLOCK_WIDTH"))
    threads = 32 * config.num_warps
    keys = 2 * block_rows * keep // threads  # an int64 key is two registers
    tiles = config.num_stages * (block_rows + columns) * width * itemsize
    return (
        width * itemsize == 128
        and keys <= KEY_REGISTERS
        and block_rows * columns // threads <= ACCUMULATORS[wide]
        and (block_rows < 128 or config.num_warps == 8)
        and tiles <= limit
    )


def _prune(configs: list[Config], arguments: dict, **constants) -> list[Config]:
    matrix = arguments["columns"]
    limit = 1 << 62 if INTERPRETED else shared_memory(matrix.device)
    rows, keep, wide = constants["BLOCK_ROWS"], constants.get("KEEP", 0), has_wide_tiles(matrix.device)
    suited = [config for config in configs if fits(config, rows, matrix.itemsize, keep, limit, wide)]
    return suited[:1] if INTERPRETED else suited


def tuned(configs: list[Config], key: list[str]) -> Callable:
    """`triton.autotune` over `configs`; the kernel's `columns` argument is the column-side matrix."""
    decorate = triton.autotune(configs, key=key, prune_configs_by={"early_config_prune": _prune}, cache_results=True)

    def apply(kernel):
        tuner = decorate(kernel)
        prune, bench = tuner.prune_configs, tuner._bench
        left = []

        def noted(arguments: dict) -> list[Config]:
            left[:] = prune(arguments)
            return left[:]

        def unless_single(*arguments, **options):
            """Triton before 3.8 times a single configuration too, which a graph capture does not survive."""
            return bench(*arguments, **options) if len(left) > 1 else [0.0, 0.0, 0.0]

        tuner.prune_configs, tuner._bench = noted, unless_single
        return tuner

    return apply
