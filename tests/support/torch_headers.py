"""The C++ headers of a torch that is not installed, read out of its wheel where that lies, without the rest of it."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import requests
from remotezip import RemoteZip

CACHE = Path(__file__).parents[2] / "build" / "torch-headers"
OWN = "TORCH_HEADERS"  # a folder VERSION/include for machines without a package index
# All that torch's stable ABI includes, and the copy of pybind11 that must not be taken for pybind11's own.
NEEDED = ("torch/csrc/stable/", "torch/csrc/inductor/aoti_torch/", "torch/headeronly/", "pybind11/")
SLACK = 1 << 12  # of a local header


def include_dirs(version: str) -> list[Path]:
    """What cpp_extension.include_paths() gives under that torch. Fetched once, 1 MB.

    Raises LookupError where no package index that has it can be reached.
    """
    folder = Path(os.environ.get(OWN, CACHE)) / version / "include"
    if not folder.is_dir():
        _fetch(version, folder)
    return [folder, folder / "torch" / "csrc" / "api" / "include"]


def _fetch(version: str, folder: Path) -> None:
    """The headers lie side by side in the wheel: its directory, then one read."""
    url = _wheel(version)
    with RemoteZip(url) as wheel:
        wanted = {info.filename.removeprefix("torch/include/"): info for info in wheel.infolist()}
    headers = {name: info for name, info in wanted.items() if name.startswith(NEEDED) and not info.is_dir()}
    start = min(info.header_offset for info in headers.values())
    end = max(info.header_offset + info.compress_size for info in headers.values()) + SLACK
    data = requests.get(url, headers={"Range": f"bytes={start}-{end}"}, timeout=60).content
    part = folder.with_suffix(f".part{os.getpid()}")
    for name, info in headers.items():
        at = info.header_offset - start
        at += 30 + sum(struct.unpack_from("<HH", data, at + 26))  # past the local header, its name and extra field
        target = part / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(zlib.decompress(data[at : at + info.compress_size], -15))
    part.replace(folder)


def _wheel(version: str) -> str:
    """Where pip would take it from."""
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--dry-run", "--no-deps", "--ignore-installed"]
    found = subprocess.run([*pip, "--report", "-", f"torch=={version}"], capture_output=True, text=True)
    if found.returncode:
        raise LookupError(f"no package index here has torch {version}: {found.stderr.strip()}")
    return json.loads(found.stdout)["install"][0]["download_info"]["url"]
