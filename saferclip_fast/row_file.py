"""A safetensors file filled in row by row: larger than memory, by several processes at once, resumable."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor


class RowFile:
    """Float32 tensors of one shape [rows, d] under `names`; space on the disk is taken at once.

    Opening a file that is there already keeps its rows, so that a killed writer's work goes on, and several processes
    may open the same one.

    Raises OSError where there is no room, and deletes the file.
    """

    def __init__(self, path: Path, names: tuple[str, ...], shape: tuple[int, int], metadata: Mapping[str, str]) -> None:
        size = shape[0] * shape[1] * 4
        header: dict = {"__metadata__": dict(metadata)}
        for i, name in enumerate(names):
            header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [i * size, (i + 1) * size]}
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)  # safetensors wants 8-byte aligned data
        self.row_bytes = shape[1] * 4
        self.starts = {name: 8 + len(text) + i * size for i, name in enumerate(names)}
        self.descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        total = 8 + len(text) + len(names) * size
        try:
            _reserve(self.descriptor, total)
        except OSError as error:
            path.unlink()
            reason = f"no room for {total / 1e9:.2f} GB in {path.parent} ({error.strerror})"
            raise OSError(error.errno, reason) from error
        os.pwrite(self.descriptor, len(text).to_bytes(8, "little") + text, 0)

    def write(self, name: str, first: int, rows: Tensor) -> None:
        """Rows [n, d] of tensor `name` from row `first` on."""
        data = rows.detach().float().cpu().contiguous().numpy().data.cast("B")
        os.pwrite(self.descriptor, data, self.starts[name] + first * self.row_bytes)

    def sync(self) -> None:
        os.fsync(self.descriptor)

    def close(self) -> None:
        self.sync()
        os.close(self.descriptor)


def _reserve(descriptor: int, size: int) -> None:
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(descriptor, 0, size)
    else:  # macOS
        os.ftruncate(descriptor, size)
