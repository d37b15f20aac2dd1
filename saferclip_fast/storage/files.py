"""Writing files so that a crash, a kill or a full disk leaves either the old file or the new one, never a torn one."""

from __future__ import annotations

import contextlib
import errno
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor


@contextlib.contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """Yields a temporary path beside `path`; on success it is synced to disk and renamed to `path`.

    Raises OSError, naming `path` and the reason, where it cannot be written (disk full, permissions).
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        temporary.chmod(0o666 & ~_umask())  # safetensors writes files that only their owner can read
        sync(temporary)
        temporary.replace(path)
        sync(path.parent)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise OSError(
            getattr(error, "errno", None) or errno.EIO,
            f"could not write {path} ({reason}); the old file, if any, is intact",
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


def _umask() -> int:
    mask = os.umask(0)  # there is no call that only reads it
    os.umask(mask)
    return mask


def save_tensors(path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Writes a safetensors file atomically from tensors of any device."""
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with atomic_write(path) as temporary:
        save_file(contiguous, temporary, dict(metadata))


def save_json(path: str | Path, value: Any) -> None:
    """Writes `value` as indented JSON atomically."""
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def remove_leftovers(folder: Path) -> None:
    """Deletes the temporary files that killed writers left in `folder`, but none of a process that lives here."""
    for temporary in folder.glob(".*.tmp"):
        number = temporary.suffixes[-2].removeprefix(".") if len(temporary.suffixes) > 1 else ""
        if not (number.isdecimal() and _lives(int(number))):
            temporary.unlink(missing_ok=True)


def _lives(process: int) -> bool:
    """Whether a process of this number runs here, other than this one."""
    try:
        os.kill(process, 0)
    except PermissionError:
        return True
    except (OSError, OverflowError):
        return False
    return process != os.getpid()


def check_writable(folder: str | Path, option: str) -> None:
    """Makes `folder` and writes to it, so that one that cannot be written to is noticed before the work.

    Raises OSError naming it, the reason and the `option` that names another.
    """
    folder = Path(folder)
    probe = folder / f".probe.{os.getpid()}.tmp"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"1")
        probe.unlink()
    except OSError as error:
        raise OSError(error.errno, f"cannot write to {folder} ({error.strerror}): {option} names another") from error


def sync(path: Path) -> None:
    """Flushes a file or, for the names in it, a folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
