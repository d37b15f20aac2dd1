"""Preparation before the first training step: rows, frozen embeddings, bank, neighbors, splits."""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from torch.utils.data import Subset

from ..bank import Bank, SafeBank, ShardedBank
from ..config import Config, ConfigError
from ..data import QuadrupletDataset, decode_images
from ..data.open import check_source
from ..data.quadruplets import QuadrupletEmbeddings
from ..embeddings import FrozenEmbeddings, bank_from, bank_metadata, embed_quadruplets
from ..models import ClipModel
from ..objectives import Objective, SafeClip, SaferClip, ShieldClip
from ..ops import Neighbors
from ..runtime.ranks import Ranks
from ..storage.files import check_writable, save_tensors
from .dataset import columns_of, open_data, split_rows
from .places import check_places

_QUERY_ROWS = 1 << 14  # searched at a time, so that only these and the bank lie on the device


@dataclass
class Split:
    """Samples to train or validate on; an item's "index" is its row in `frozen` and `neighbors`."""

    samples: Subset
    frozen: QuadrupletEmbeddings
    bank: Bank  # safe pairs of the training samples
    neighbors: Neighbors | None  # rows of `bank`; None: search in the step
    mixed: bool  # some unsafe-side texts or images are labeled safe, wholly or in part

    def frozen_of(self, index: Tensor, device: torch.device) -> QuadrupletEmbeddings:
        """Frozen embeddings [B, d] of the samples `index` [B]."""
        return QuadrupletEmbeddings(*(column[index].to(device, non_blocking=True) for column in self.frozen))

    def neighbors_of(self, index: Tensor, device: torch.device) -> Neighbors | None:
        """Neighbors [B, k] of the samples `index` [B], if they are known."""
        if self.neighbors is None:
            return None
        return Neighbors(*(column[index].to(device, non_blocking=True) for column in self.neighbors))


@dataclass
class TrainingData:
    """The data of a run: its splits with their frozen embeddings, and the curriculum's order."""

    train: Split
    val: Split | None
    similarity: Tensor  # [training samples] cosine of each unsafe text and its nearest safe text
    data_hash: str  # of the training and validation samples


def prepare(config: Config, clip: ClipModel, ranks: Ranks = Ranks()) -> TrainingData:  # noqa: B008 - it is immutable
    """Open, verify and embed the data, build the bank and find every unsafe text's safe neighbors in it.

    Everything slow is shared by the ranks and cached in `data.cache_dir` by content. `clip` must still be frozen.

    Raises:
        ConfigError: no training data named, too few for the split or for k, or labels that the objective cannot weigh.
        data.DataError, OSError: see data.open_quadruplets and embeddings.embed_quadruplets.
    """
    check_inputs(config)
    opened = open_data(config, config.data.train, clip, ranks)
    mixed = _mixed(config, opened)
    dataset = _decoded(config, opened, ranks)
    frozen = _embed(config, clip, dataset, ranks)
    train_index, val_index = split_rows(len(dataset), 0 if config.data.val else config.data.val_fraction, config.seed)
    if len(train_index) < config.objective.k:
        raise ConfigError(f"objective.k={config.objective.k} is more than the {len(train_index)} training samples")
    bank, bank_name = _bank(config, frozen, train_index, clip.device, ranks)
    neighbors = _neighbors(config, frozen, bank, bank_name, clip.device, ranks)
    in_step = config.objective.neighbors == "in_step"
    samples = Subset(dataset, train_index.tolist())
    train = Split(samples, frozen.embeddings, bank, None if in_step else neighbors, mixed)
    val, data_hash = None, frozen.metadata["data_hash"]
    if config.data.val:
        opened = open_data(config, config.data.val, clip, ranks)
        held_out_mixed = _mixed(config, opened)
        held_out = _decoded(config, opened, ranks)
        held_out_frozen = _embed(config, clip, held_out, ranks)
        found = _neighbors(config, held_out_frozen, bank, bank_name, clip.device, ranks)
        every = torch.arange(len(held_out))
        val = Split(
            Subset(held_out, every.tolist()), held_out_frozen.embeddings, *_near(bank, found, every), held_out_mixed
        )
        data_hash = hashlib.sha256(f"{data_hash} {held_out_frozen.metadata['data_hash']}".encode()).hexdigest()
    elif len(val_index):
        val = Split(Subset(dataset, val_index.tolist()), frozen.embeddings, *_near(bank, neighbors, val_index), mixed)
    return TrainingData(train, val, neighbors.scores[train_index, 0], data_hash)


def check_inputs(config: Config) -> None:
    """What can be known of the data, its cache and the objective before the model is loaded.

    Raises:
        what check_places raises; ValueError: an option of a source or of the objective that does not exist or fit.
        OSError: data.cache_dir cannot be written to.
    """
    check_places(config)
    check_adapters(config)
    columns_of(config)
    build_objective(config)
    options = config.data
    for source in (options.train, options.val):
        if source:
            check_source(source, options.root or None)
    check_writable(options.cache_dir, "data.cache_dir")


def check_adapters(config: Config) -> None:
    """Raises ConfigError for options of adapters that a run without them, or of no size, cannot have."""
    options = config.lora
    for given, said in ((options.dora, "lora.dora=true"), (options.init == "fisher", "lora.init=fisher")):
        if given and config.model.tuning != "lora":
            raise ConfigError(f"{said} needs model.tuning=lora: full tuning has no adapters")
    if options.init == "fisher" and options.alpha == 0:
        raise ConfigError("lora.init=fisher needs lora.alpha above 0: adapters of scale 0 start nowhere")


def build_objective(config: Config) -> Objective:
    """The objective that the options describe."""
    options = config.objective
    if options.name == "safeclip":
        return SafeClip(targets=options.targets, logit_scale=options.logit_scale, backend=options.backend)
    if options.name == "shieldclip":
        return ShieldClip(logit_scale=options.logit_scale, backend=options.backend)
    return SaferClip(
        asdict(options.weights),
        k=options.k,
        tau=options.tau,
        beta=options.beta,
        margin=options.margin,
        negative=options.negative,
        page=options.page,
        guard_k=options.guard_k,
        guard_margin=options.guard_margin,
        logit_scale=options.logit_scale,
        backend=options.backend,
    )


def _decoded(config: Config, dataset: QuadrupletDataset, ranks: Ranks) -> QuadrupletDataset:
    """The same data set, its images kept as they are after resizing if data.decoded_cache says so."""
    options = config.data
    if not options.decoded_cache:
        return dataset
    return decode_images(
        dataset, options.cache_dir, num_workers=options.num_workers, progress=config.log.progress, ranks=ranks
    )


def _embed(config: Config, clip: ClipModel, dataset: QuadrupletDataset, ranks: Ranks) -> FrozenEmbeddings:
    return embed_quadruplets(
        clip,
        dataset,
        config.data.cache_dir,
        batch_size=config.train.embed_batch_size,
        num_workers=config.data.num_workers,
        precision=config.train.precision,
        progress=config.log.progress,
        ranks=ranks,
    )


def _bank(
    config: Config, frozen: FrozenEmbeddings, index: Tensor, device: torch.device, ranks: Ranks
) -> tuple[Bank, str]:
    """The bank of the safe pairs at `index`, as objective.bank says, and a name by content."""
    digest = hashlib.sha256(frozen.path.name.encode())
    digest.update(index.numpy().data)
    name = digest.hexdigest()[:24]
    if config.objective.bank == "resident":
        return bank_from(frozen, index).to(device).pack(), name
    if config.objective.bank == "sharded":
        mine = ranks.split(len(index))
        shard = bank_from(frozen, index[mine.start : mine.stop])
        shard.offset = mine.start
        return ShardedBank(shard.to(device).pack(), ranks, len(index), device), name
    path = Path(config.data.cache_dir) / f"bank-{name}.safetensors"
    if ranks.first and not path.is_file():
        SafeBank.build(path, frozen.embeddings.safe_text, frozen.embeddings.safe_image, index, bank_metadata(frozen))
    ranks.wait()
    return ShardedBank(SafeBank.load(path), device=device), name


def _neighbors(
    config: Config,
    frozen: FrozenEmbeddings,
    bank: Bank,
    bank_name: str,
    device: torch.device,
    ranks: Ranks,
) -> Neighbors:
    """The k nearest safe texts of the bank for every unsafe text of `frozen`: [N, k], on the CPU, cached."""
    k, backend = config.objective.k, config.objective.backend
    key = hashlib.sha256(f"{frozen.path.name} {bank_name} {k}".encode()).hexdigest()[:24]
    path = Path(config.data.cache_dir) / f"neighbors-{key}.safetensors"
    rows = len(frozen.embeddings.unsafe_text)
    known = _known_neighbors(path, rows, k) if ranks.first else None
    if not ranks.largest(ranks.first and known is None):
        return known or Neighbors(**load_file(path))
    mine = ranks.split(rows)
    queries = frozen.embeddings.unsafe_text[mine.start : mine.stop]
    parts = []
    for begin in range(0, ranks.largest(len(mine)), _QUERY_ROWS):  # as often on every rank
        query = queries[begin : begin + _QUERY_ROWS].to(device)
        parts.append(bank.nearest(query, k, backend=backend))
    found = Neighbors(*(ranks.gather_rows(torch.cat(column)).cpu() for column in zip(*parts, strict=True)))
    if ranks.first:
        save_tensors(path, found._asdict(), {"k": str(k)})
    return found


def _known_neighbors(path: Path, rows: int, k: int) -> Neighbors | None:
    """What was found before; None, so that it is found again, where there is no such file or it is damaged."""
    try:
        found = Neighbors(**load_file(path)) if path.is_file() else None
    except (SafetensorError, TypeError, OSError):
        return None
    return found if found and {tuple(x.shape) for x in found} == {(rows, k)} else None


def _near(bank: Bank, neighbors: Neighbors, index: Tensor) -> tuple[SafeBank, Neighbors]:
    """A bank on the device that holds the `neighbors` of the samples `index`, and their numbers in it."""
    small, numbered = bank.gather(Neighbors(*(column[index] for column in neighbors)))
    indices = torch.zeros_like(neighbors.indices)
    indices[index] = numbered.indices.cpu()
    return small, Neighbors(neighbors.scores, indices)


def _mixed(config: Config, dataset: QuadrupletDataset) -> bool:
    """Whether a text or image of the unsafe side is labeled safe, wholly or in part.

    Raises:
        ConfigError: a label lies between 0 and 1, which the objective cannot weigh; names file and row.
    """
    takes_scores, mixed = build_objective(config).takes_scores, False
    for record in dataset.records:
        labels = record.unsafe_text_label, record.unsafe_image_label
        mixed |= labels != (1, 1)
        if not takes_scores and not {0, 1}.issuperset(labels):
            raise ConfigError(
                f"{record.file}, row {record.row}: objective.name={config.objective.name} takes labels of 0 and 1, got "
                f"{labels[0]:g} (text) and {labels[1]:g} (image): round them, or take saferclip, which weighs by them"
            )
    return mixed
