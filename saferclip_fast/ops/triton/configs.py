"""Launch configurations: few, each with a reason, pruned by shape and hardware before any is timed.

The query-side block (BLOCK_ROWS) is not tuned: it is a step function of the batch size (`shared.rows_per_block`), so
the tuning key holds no batch size and a batch that varies neither re-tunes nor recompiles. Timings are cached on disk
by Triton (cache_results), under TRITON_CACHE_DIR.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
from triton import Config

from .shared import INTERPRETED

# A tile row is 128 bytes along d, one cache line and the widest shared-memory swizzle: 64 half-precision or 32 float32.
WIDTHS = (64, 32)
KEY_REGISTERS = 64  # at most this many registers a thread for running top-k keys; more spilled when compiled for sm_80


# Left to itself, ptxas spills a few registers to fit one more program on a multiprocessor. AMD has no such option.
MAX_REGISTERS = None if torch.version.hip else 255


def _product(columns: int, warps: int, stages: int, **more: int) -> list[Config]:
    tiles = {"BLOCK_COLUMNS": columns, **more}
    return [
        Config({**tiles, "BLOCK_WIDTH": width}, num_warps=warps, num_stages=stages, maxnreg=MAX_REGISTERS)
        for width in WIDTHS
    ]


# Rows against columns, one reduction along the columns (search, log-sum-exp).
PRODUCT = [
    *_product(128, warps=8, stages=3),  # most reuse: each loaded byte meets 128 columns; 96 KiB at 128 rows
    *_product(
        64, warps=4, stages=4
    ),  # two or more programs a multiprocessor, one reduces while another multiplies
]
# Rows against columns, then against a CHUNK of d (gradient): the accumulator is [rows, CHUNK].
GRADIENT = [
    *_product(64, warps=8, stages=2, CHUNK=256),  # the logits are recomputed d / 256 times
    *_product(64, warps=4, stages=2, CHUNK=128),  # more programs, for batches that would leave processors idle
]


def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that one program may use on this device."""
    index = device.index if device.index is not None else torch.cuda.current_device()
    return triton.runtime.driver.active.utils.get_device_properties(index)["max_shared_mem"]


def fits(config: Config, block_rows: int, itemsize: int, keep: int, limit: int) -> bool:
    """Whether a configuration suits the dtype, and its tiles and keys the chip."""
    columns, width = config.kwargs["BLOCK_COLUMNS"], config.kwargs["BLOCK_WIDTH"]
    keys = 2 * block_rows * keep // (32 * config.num_warps)  # an int64 key is two registers
    tiles = config.num_stages * (block_rows + columns) * width * itemsize
    tiles += config.kwargs.get("CHUNK", 0) * columns * itemsize
    return width * itemsize == 128 and keys <= KEY_REGISTERS and tiles <= limit


def _prune(configs: list[Config], arguments: dict, **constants) -> list[Config]:
    matrix = arguments["columns"]
    limit = 1 << 62 if INTERPRETED else shared_memory(matrix.device)
    suited = [c for c in configs if fits(c, constants["BLOCK_ROWS"], matrix.itemsize, constants.get("KEEP", 0), limit)]
    return suited[:1] if INTERPRETED else suited


def tuned(configs: list[Config], key: list[str]) -> Callable:
    """`triton.autotune` over `configs`; the kernel's `columns` argument is the column-side matrix."""
    return triton.autotune(configs, key=key, prune_configs_by={"early_config_prune": _prune}, cache_results=True)
