"""Rows of a data set computed once and kept: resumable, shared by processes, named by what they depend on."""

from __future__ import annotations

import fcntl
import hashlib
import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset
from tqdm import tqdm

from ..runtime.ranks import Ranks
from ..runtime.stop import ignore_stop_signals
from .files import save_json, sync
from .row_file import RowFile

_SYNC_BYTES = 1 << 26  # at most so much is made again after a kill


def fill(
    cache_dir: str | Path,
    kind: str,
    metadata: Mapping[str, str],
    dataset: Dataset,
    collate: Callable[[list[Any]], Mapping[str, Any]],
    compute: Callable[[Mapping[str, Any]], Mapping[str, Tensor]],
    *,
    batch_size: int,
    num_workers: int,
    title: str,
    progress: bool,
    ranks: Ranks,
) -> Path:
    """Make CACHE_DIR/KIND-HASH.safetensors, a row for each sample of `dataset`, unless it is there; returns its path.

    Each row is computed once, though runs are killed on the way. A second run waits for the first one and then finds
    its file.

    Args:
        cache_dir: a folder that all ranks see.
        metadata: of the file's header, "rows" among it; everything that the rows depend on, for HASH is of it.
        collate: samples of `dataset` to a batch; "index" holds their numbers, int64 [n].
        compute: tensors [n, ...] of a batch, by name.
        batch_size, num_workers: of the loader.
        title, progress: of the bar.
        ranks: the processes that share the work.

    Raises OSError where there is no room (found out with the first batch), or it cannot be written.
    """
    digest = hashlib.sha256(json.dumps(metadata, sort_keys=True).encode()).hexdigest()[:24]
    path = Path(cache_dir) / f"{kind}-{digest}.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)

    def loader(rows: list[int]) -> DataLoader:
        return DataLoader(
            Subset(dataset, rows),
            batch_size,
            collate_fn=collate,
            num_workers=num_workers,
            worker_init_fn=ignore_stop_signals,
            generator=torch.Generator(),  # leaves the global generator alone
        )

    # the first rank waits for other runs, the others wait for what it finds
    with _lock(path.with_suffix(".lock")) if ranks.first else nullcontext():
        if ranks.largest(ranks.first and not path.is_file()):
            _make(path, metadata, loader, compute, title, progress, ranks)
    if not path.is_file():
        raise FileNotFoundError(f"rank {ranks.rank} does not see {path}: data.cache_dir must be shared by all machines")
    return path


def read(
    path: str | Path, names: Sequence[str], expect: Mapping[str, str] | None = None
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors `names` and metadata of a file, on the CPU, memory-mapped: rows are read from disk when they are used.

    Raises ValueError where it is damaged, or made from something else than `expect` says; names the field and the
    remedy.
    """
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            metadata = dict(file.metadata() or {})
            tensors = {name: file.get_tensor(name) for name in names}
            rows = int(metadata["rows"])
    except (SafetensorError, KeyError, ValueError) as error:  # KeyError: also of an element type that torch lacks
        raise ValueError(f"{path} is damaged ({error}); delete it to make it again") from error
    for name, tensor in tensors.items():
        if tensor.shape[:1] != (rows,):
            raise ValueError(f"{path} is damaged ({name} has not {rows} rows); delete it to make it again")
    for key, wanted in (expect or {}).items():
        if metadata.get(key) != wanted:
            raise ValueError(
                f"{path} was made with {key}={metadata.get(key)!r}, but {key}={wanted!r} is in use; "
                "delete the file to make it again, or use the model and data that it was made from"
            )
    return tensors, metadata


def _make(path, metadata, loader, compute, title, progress, ranks) -> None:
    rows = int(metadata["rows"])
    partial, done = path.with_suffix(".partial"), _rows_done(path, rows)
    ranks.wait()  # until all have read what is done
    if ranks.first and not done.any():
        partial.unlink(missing_ok=True)
    ranks.wait()
    missing = (~done).nonzero().squeeze(1)
    mine = ranks.split(len(missing))
    file: RowFile | None = None
    unsynced = 0
    with tqdm(total=len(mine), desc=title, unit="row", disable=not (progress and ranks.first)) as bar:
        for batch in loader(missing[mine.start : mine.stop].tolist()):
            tensors, index = compute(batch), batch["index"]
            if file is None:
                shapes = {name: (x.dtype, (rows, *x.shape[1:])) for name, x in tensors.items()}
                file = RowFile(partial, shapes, metadata)
            for begin, end in _runs(index):
                for name, tensor in tensors.items():
                    unsynced += file.write(name, int(index[begin]), tensor[begin:end])
            done[index] = True
            bar.update(len(index))
            if unsynced >= _SYNC_BYTES:
                file.sync()
                finished = done.nonzero().squeeze(1)
                runs = [(int(finished[begin]), int(finished[end - 1]) + 1) for begin, end in _runs(finished)]
                save_json(_progress_file(path, ranks.rank), {"rows": runs})
                unsynced = 0
    if file is not None:
        file.close()
    ranks.wait()
    if ranks.first:
        partial.replace(path)
        sync(path.parent)
        for progress_file in _progress_files(path):
            progress_file.unlink()
    ranks.wait()


def _progress_file(path: Path, rank: int) -> Path:
    return path.with_suffix(f".progress-{rank}.json")


def _progress_files(path: Path) -> list[Path]:
    return sorted(path.parent.glob(f"{path.stem}.progress-*.json"))


def _rows_done(path: Path, rows: int) -> Tensor:
    """[rows] bool: the rows that killed runs, on any number of ranks, left behind for certain."""
    done = torch.zeros(rows, dtype=torch.bool)
    if path.with_suffix(".partial").is_file():
        for progress_file in _progress_files(path):
            try:
                runs = json.loads(progress_file.read_text())["rows"]
                for begin, end in runs:
                    done[begin:end] = True
            except (OSError, ValueError, KeyError, TypeError):
                continue  # these rows are made again
    return done


def _runs(numbers: Tensor) -> list[tuple[int, int]]:
    """Positions [begin, end) in ascending `numbers` between which each is one more than the one before."""
    breaks = ((numbers[1:] - numbers[:-1]) != 1).nonzero().squeeze(1) + 1
    edges = [0, *breaks.tolist(), len(numbers)]
    return list(itertools.pairwise(edges))


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Held by one process at a time; released by the system when the process ends, however it ends."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
