"""A safetensors file whose rows are written one part at a time: larger than memory, by several processes at once."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

_TYPES = {torch.int64: "I64", torch.float32: "F32", torch.uint8: "U8"}


class RowFile:
    """Tensors [rows, ...] by name; space on the disk is taken at once.

    Opening a file that is there already keeps its rows, so that a killed writer's work goes on, and several processes
    may open the same one.

    Args:
        path: the file.
        tensors: type and shape of each: float32, uint8 or int64.
        metadata: of the safetensors header.

    Raises OSError where there is no room, and deletes the file.
    """

    def __init__(
        self, path: Path, tensors: Mapping[str, tuple[torch.dtype, Sequence[int]]], metadata: Mapping[str, str]
    ) -> None:
        header: dict = {"__metadata__": dict(metadata)}
        self.tensors, self.starts, end = dict(tensors), {}, 0
        # wide numbers first, so that all lie at multiples of their size
        for name, (dtype, shape) in sorted(tensors.items(), key=lambda item: -item[1][0].itemsize):
            self.starts[name], end = end, end + torch.Size(shape).numel() * dtype.itemsize
            header[name] = {"dtype": _TYPES[dtype], "shape": list(shape), "data_offsets": [self.starts[name], end]}
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)  # safetensors wants 8-byte aligned data
        self.begin = 8 + len(text)
        self.descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            _reserve(self.descriptor, self.begin + end)
        except OSError as error:
            path.unlink()
            reason = f"no room for {(self.begin + end) / 1e9:.2f} GB in {path.parent} ({error.strerror})"
            raise OSError(error.errno, reason) from error
        os.pwrite(self.descriptor, len(text).to_bytes(8, "little") + text, 0)

    def write(self, name: str, first: int, rows: Tensor) -> int:
        """Rows [n, ...] of tensor `name` from row `first` on; returns their size in bytes.

        Raises ValueError for rows of another shape, OSError where they cannot be written.
        """
        dtype, shape = self.tensors[name]
        if rows.shape[1:] != torch.Size(shape[1:]):
            raise ValueError(f"rows of {name} are {list(shape[1:])}, but row {first} is {list(rows.shape[1:])}")
        data = rows.detach().to(dtype).cpu().contiguous().numpy().data.cast("B")
        row_bytes = torch.Size(shape[1:]).numel() * dtype.itemsize
        os.pwrite(self.descriptor, data, self.begin + self.starts[name] + first * row_bytes)
        return len(data)

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
