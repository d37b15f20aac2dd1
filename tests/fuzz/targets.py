"""What is fuzzed: each reader of a file that a user brings, some valid files to start from, the errors it may raise."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from saferclip_fast import BackendError, SafeBank, nearest_safe
from saferclip_fast.checkpoint import CheckpointError, CheckpointFolder
from saferclip_fast.config import ConfigError, load_config
from saferclip_fast.data import DataError, open_quadruplets
from saferclip_fast.data.images import FORMATS, ImageError, decode
from saferclip_fast.data.open import parse_options

from ..data.quadruplet_files import image_bytes, write_tar

# One small image that every table may name. Nothing above this folder may be read.
IMAGE = "a.png"


@dataclass(frozen=True)
class Target:
    name: str
    suffix: str
    read: Callable[[Path], object]  # opens the file and uses what it got
    allowed: tuple[type[Exception], ...]
    seeds: Callable[[], list[bytes]]

    def __call__(self, content: bytes) -> None:
        """Reads `content` as a file; an error that is not allowed comes out."""
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / IMAGE).write_bytes(_IMAGE_BYTES)
            path = Path(folder) / f"input{self.suffix}"
            path.write_bytes(content)
            try:
                self.read(path)
            except self.allowed as error:
                # a message for a person, not a bare KeyError's, that any terminal can show
                assert len(str(error).encode()) > 10, repr(error)


_IMAGE_BYTES = image_bytes(0)


def _read_quadruplets(path: Path) -> None:
    options = {"root": path.parent, "unsafe_image": IMAGE} if path.suffix == ".json" else {}
    data = open_quadruplets(path, on_error="skip", max_pixels=10_000, progress=False, **options)
    assert data.summary.kept == len(data)
    "".join(data.summary.problems).encode()
    for index in range(len(data)):
        data[index]
    data.content_hash()


def _read_bank(path: Path) -> None:
    bank = SafeBank.load(path)
    # NaN in the file is the caller's data: the search may answer anything, but it may not read out of bounds
    nearest_safe(torch.ones(3, bank.width), bank, min(2, len(bank)), check=False)


def _read_checkpoint(path: Path) -> None:
    folder = path.parent / "checkpoints"
    folder.mkdir()
    path.rename(folder / "step-0000000001.safetensors")
    CheckpointFolder(folder, keep=1).load_newest()


def _read_source(path: Path) -> None:
    options = parse_options(path.read_text("utf-8", "replace"))
    if isinstance(options.get("n"), int) and options["n"] < 100:  # a large data set is slow, not wrong
        open_quadruplets("scenes:" + path.read_text("utf-8", "replace"), progress=False)


def _image_seeds() -> list[bytes]:
    return [image_bytes(1, fmt=name) for name in FORMATS]


def _table_seeds() -> list[bytes]:
    header = b"safe_image,unsafe_image,safe_text,unsafe_text,unsafe_text_label\n"
    return [header + b'a.png,a.png,"a cat, asleep",a hazard,1\n', header + b"../a.png,/etc/hostname,x,y,0\n"]


def _jsonl_seeds() -> list[bytes]:
    row = {"safe_image": IMAGE, "unsafe_image": IMAGE, "safe_text": "a cat", "unsafe_text": "a hazard"}
    return [json.dumps(row).encode() + b"\n", json.dumps(row | {"unsafe_image_label": 0}).encode() + b"\n\n{}"]


def _visu_seeds() -> list[bytes]:
    entry = {"safe": "a cat", "nsfw": "a hazard", "coco_id": 9, "nsfw_im_path": IMAGE}
    return [json.dumps({"1": entry}).encode(), json.dumps({"info": {}, "data": [entry]}).encode()]


def _shard_seeds() -> list[bytes]:
    texts = json.dumps({"safe_text": "a cat", "unsafe_text": "a hazard"}).encode()
    members = {"0.safe_image.png": _IMAGE_BYTES, "0.unsafe_image.png": _IMAGE_BYTES, "0.json": texts}
    with tempfile.TemporaryDirectory() as folder:
        return [write_tar(Path(folder) / "s.tar", members).read_bytes()]


def _bank_seeds() -> list[bytes]:
    generator = torch.Generator().manual_seed(0)
    text, image = torch.randn(2, 40, 16, generator=generator)
    seeds = []
    with tempfile.TemporaryDirectory() as folder:
        for bank in (SafeBank(text, image), SafeBank(text, image).pack()):
            bank.save(Path(folder) / "bank")
            seeds.append((Path(folder) / "bank").read_bytes())
    return seeds


def _checkpoint_seeds() -> list[bytes]:
    with tempfile.TemporaryDirectory() as folder:
        state = {"progress": {"step": 1}, "config": {}}
        return [CheckpointFolder(folder, keep=1).save(1, {"model.w": torch.ones(3)}, state).read_bytes()]


def _config_seeds() -> list[bytes]:
    return [b"optimizer:\n  lr: 1e-3\nlora:\n  targets: [in_proj, out_proj]\n", b"data: {train: x.csv}\nseed: 3\n"]


TARGETS = [
    Target("csv", ".csv", _read_quadruplets, (DataError,), _table_seeds),
    Target("jsonl", ".jsonl", _read_quadruplets, (DataError,), _jsonl_seeds),
    Target("visu", ".json", _read_quadruplets, (DataError,), _visu_seeds),
    Target("shards", ".tar", _read_quadruplets, (DataError,), _shard_seeds),
    Target("image", ".bin", lambda path: decode(path.read_bytes(), "input", 10_000), (ImageError,), _image_seeds),
    Target("bank", ".safetensors", _read_bank, (ValueError, BackendError), _bank_seeds),
    Target("checkpoint", ".safetensors", _read_checkpoint, (CheckpointError,), _checkpoint_seeds),
    Target("config", ".yaml", load_config, (ConfigError,), _config_seeds),
    Target("source", ".txt", _read_source, (ValueError,), lambda: [b"n=3,seed=0", b"n=2,mismatch=0.5,size=16"]),
]
