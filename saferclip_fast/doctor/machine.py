"""The machine and what is installed on it, in lines of text."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
from pathlib import Path

import torch

from ..ops.register import _C
from ..version import __version__

PACKAGES = ("torch", "triton", "open_clip_torch", "peft", "numpy", "safetensors")
OPTIONAL = {"pyarrow": "parquet", "transformers": "export", "onnxruntime": "export", "nudenet": "evaluate"}  # and extra
GIB = 2**30


def describe() -> list[str]:
    """Versions, processor, memory, GPUs, and what is not installed."""
    lines = [f"saferclip_fast {__version__}, Python {platform.python_version()}, {platform.platform()}"]
    lines.append(", ".join(f"{name} {_version(name) or 'missing'}" for name in PACKAGES))
    installed = [f"{name} {version}" for name in OPTIONAL if (version := _version(name))]
    lines.append(f"optional: {', '.join(installed) or 'none'}")
    for extra in sorted({extra for name, extra in OPTIONAL.items() if not _version(name)}):
        missing = [name for name, its in OPTIONAL.items() if its == extra and not _version(name)]
        lines.append(f"  not installed: {', '.join(missing)} (pip install 'saferclip-fast[{extra}]')")
    sets = f", {_C.cpu_isas()[0]} kernels" if _C is not None else ""
    lines.append(f"processor: {os.cpu_count()} cores, {torch.get_num_threads()} threads{sets}")
    lines.append(f"memory: {_memory()}; disk here: {shutil.disk_usage('.').free / GIB:.1f} GiB free")
    lines += _gpus()
    return lines


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _memory() -> str:
    try:
        text = Path("/proc/meminfo").read_text(encoding="utf-8")
        size = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in text.splitlines() if "kB" in line}
        return f"{size['MemTotal'] / GIB:.1f} GiB, {size['MemAvailable'] / GIB:.1f} GiB free"
    except (OSError, KeyError, ValueError, IndexError):
        return "not known (no /proc/meminfo)"


def _gpus() -> list[str]:
    if not torch.cuda.is_available():
        return ["GPU: none that torch sees"]
    lines = []
    for number in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(number)
        lines.append(
            f"GPU {number}: {torch.cuda.get_device_name(number)}, {total / GIB:.1f} GiB, {free / GIB:.1f} GiB free"
        )
    return lines
