"""What is computed once before the first training step: rows, frozen embeddings, bank, neighbors, splits."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.utils.data import Subset

from .bank import SafeBank
from .config import Config, ConfigError
from .data import QuadrupletDataset, open_quadruplets
from .embeddings import FrozenEmbeddings, bank_from, embed_quadruplets
from .files import save_tensors
from .models import ClipModel
from .objectives import QuadrupletEmbeddings
from .ops import Neighbors, nearest_safe

_QUERY_ROWS = 1 << 14  # searched at a time, so that only these and the bank lie on the device


@dataclass
class Split:
    """Samples to train or validate on; an item's "index" is its row in `frozen` and `neighbors`."""

    samples: Subset
    frozen: QuadrupletEmbeddings
    neighbors: Neighbors
    mixed: bool  # some unsafe-side texts or images are labelled safe

    def frozen_rows(self, index: Tensor, device: torch.device) -> QuadrupletEmbeddings:
        """Frozen embeddings [B, d] of the samples `index` [B]."""
        return QuadrupletEmbeddings(*(rows[index].to(device, non_blocking=True) for rows in self.frozen))

    def neighbor_rows(self, index: Tensor, device: torch.device) -> Neighbors:
        """Neighbors [B, k] of the samples `index` [B]."""
        return Neighbors(*(rows[index].to(device, non_blocking=True) for rows in self.neighbors))


@dataclass
class TrainingData:
    train: Split
    val: Split | None
    bank: SafeBank  # safe pairs of the training samples, on the device
    similarity: Tensor  # [training samples] cosine of each unsafe text and its nearest safe text
    data_hash: str  # of the training and validation samples


def prepare(config: Config, clip: ClipModel) -> TrainingData:
    """Open, verify and embed the data, build the bank and find every unsafe text's safe neighbors in it.

    Everything slow is cached in `data.cache_dir` by content. `clip` must still be frozen.

    Raises:
        ConfigError: no training data named, or too few for the split or for k.
        data.DataError, OSError: see data.open_quadruplets and embeddings.embed_quadruplets.
    """
    if not config.data.train:
        raise ConfigError("data.train is empty: name the training quadruplets, e.g. data.train=visu.json")
    dataset = open_data(config, config.data.train, clip)
    frozen = _embed(config, clip, dataset)
    train_rows, val_rows = split_rows(len(dataset), 0 if config.data.val else config.data.val_fraction, config.seed)
    if len(train_rows) < config.objective.k:
        raise ConfigError(f"objective.k={config.objective.k} is more than the {len(train_rows)} training samples")
    bank = bank_from(frozen, train_rows).to(clip.device).pack()
    neighbors = _neighbors(config, frozen, bank, train_rows)
    mixed = _mixed(dataset)
    train = Split(Subset(dataset, train_rows.tolist()), frozen.rows, neighbors, mixed)
    val, data_hash = None, frozen.metadata["data_hash"]
    if config.data.val:
        held_out = open_data(config, config.data.val, clip)
        rows = _embed(config, clip, held_out)
        found = _neighbors(config, rows, bank, train_rows)
        val = Split(Subset(held_out, range(len(held_out))), rows.rows, found, _mixed(held_out))
        data_hash = hashlib.sha256(f"{data_hash} {rows.metadata['data_hash']}".encode()).hexdigest()
    elif len(val_rows):
        val = Split(Subset(dataset, val_rows.tolist()), frozen.rows, neighbors, mixed)
    return TrainingData(train, val, bank, neighbors.scores[train_rows, 0], data_hash)


def open_data(config: Config, source: str, clip: ClipModel) -> QuadrupletDataset:
    """The data set at `source` with the model's preprocessing, bad rows handled as data.on_error says.

    Every image is decoded once; the outcome is kept in `data.cache_dir`, so a resumed run starts at once.
    """
    options = config.data
    columns = {field: name for field, _, name in (word.partition("=") for word in options.columns)}
    if "" in columns.values():
        raise ConfigError(f"data.columns={options.columns}: write field=column, e.g. [safe_text=caption]")
    dataset = open_quadruplets(
        source,
        transform=clip.preprocess,
        on_error=options.on_error,
        root=options.root or None,
        columns=columns or None,
        allow_absolute=options.allow_absolute,
        unsafe_root=options.unsafe_root or None,
        unsafe_image=options.unsafe_image or None,
        max_pixels=options.max_pixels,
        verify=True,
        cache_dir=options.cache_dir,
        progress=config.log.progress,
    )
    print(dataset.summary, flush=True)
    return dataset


def _embed(config: Config, clip: ClipModel, dataset: QuadrupletDataset) -> FrozenEmbeddings:
    return embed_quadruplets(
        clip,
        dataset,
        config.data.cache_dir,
        batch_size=config.train.embed_batch_size,
        num_workers=config.data.num_workers,
        precision=config.train.precision,
        progress=config.log.progress,
    )


def split_rows(samples: int, fraction: float, seed: int) -> tuple[Tensor, Tensor]:
    """Rows to train on and rows held out, each in order; the same for the same seed."""
    order = torch.randperm(samples, generator=torch.Generator().manual_seed(seed))
    held_out = round(samples * fraction)
    return order[held_out:].sort().values, order[:held_out].sort().values


def _neighbors(config: Config, frozen: FrozenEmbeddings, bank: SafeBank, bank_rows: Tensor) -> Neighbors:
    """The k nearest safe texts of the bank for every unsafe text of `frozen`: [N, k], on the CPU, cached."""
    k = config.objective.k
    digest = hashlib.sha256(f"{frozen.path.name} {bank.metadata} {k}".encode())
    digest.update(bank_rows.numpy().data)
    path = Path(config.data.cache_dir) / f"neighbors-{digest.hexdigest()[:24]}.safetensors"
    if not path.is_file():
        queries = frozen.rows.unsafe_text.split(_QUERY_ROWS)
        parts = [nearest_safe(q.to(bank.device), bank, k, backend=config.objective.backend) for q in queries]
        found = Neighbors(*(torch.cat([part.cpu() for part in column]) for column in zip(*parts, strict=True)))
        save_tensors(path, found._asdict(), {"k": str(k)})
    return Neighbors(**load_file(path))


def _mixed(dataset: QuadrupletDataset) -> bool:
    return any(not (r.unsafe_text_label and r.unsafe_image_label) for r in dataset.records)
