"""A folder that one process at a time writes to: a second one is told which, instead of losing files to it."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path

from ..errors import UserError

LOCK = ".lock"
_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL)  # of a file system that has none
_held: dict[str, int] = {}  # place -> thread of this process: the system's locks are between processes


class InUseError(UserError, RuntimeError):
    """Another process is writing to the folder."""


@contextlib.contextmanager
def claim(folder: str | Path) -> Iterator[None]:
    """Inside, this process alone may write to `folder`, which is made where it is missing.

    The claim ends with the body, or with the process, however that ends. The thread that holds a folder may claim it
    again.

    Raises:
        InUseError: another process holds it; names its number and machine.
        OSError: the folder cannot be made or written to.
    """
    folder = Path(folder)
    place, me = str(folder.absolute()), threading.get_ident()
    if _held.get(place) == me:
        yield
        return
    if place in _held:
        raise InUseError(f"{folder} is in use by this process, in another thread: {_remedy()}")
    made = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = _lock(folder)
    except OSError as error:
        raise OSError(error.errno, f"cannot write to {folder} ({error.strerror})") from error
    _held[place] = me
    try:
        yield
    finally:
        del _held[place]
        with contextlib.suppress(OSError):  # it is only a name: the lock goes with the descriptor
            (folder / LOCK).unlink()
        os.close(descriptor)
        if made:
            with contextlib.suppress(OSError):  # not empty: the work has begun
                folder.rmdir()


def _lock(folder: Path) -> int:
    """A descriptor that holds the lock. Raises InUseError."""
    path = folder / LOCK
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)  # not flock: loader processes would inherit it
            if path.stat().st_ino == os.fstat(descriptor).st_ino:
                os.truncate(descriptor, 0)
                os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
                return descriptor
        except FileNotFoundError:
            pass  # its holder has gone and taken the name with it
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                holder = os.pread(descriptor, 200, 0).decode(errors="replace") or "another process"
                os.close(descriptor)
                raise InUseError(f"{folder} is in use by {holder}: {_remedy()}") from error
            if error.errno not in _NO_LOCKS:
                os.close(descriptor)
                raise
            warnings.warn(f"{folder}: its file system has no locks, so nothing keeps a second run out", stacklevel=4)
            return descriptor
        os.close(descriptor)


def _remedy() -> str:
    return "wait for it, stop it, or choose another folder"
