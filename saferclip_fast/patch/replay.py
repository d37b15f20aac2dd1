"""The run's own quadruplets, which a patch goes over again."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..bank import SafeBank
from ..config import Config, ConfigError
from ..data import DataError, QuadrupletDataset
from ..data.errors import ErrorPolicy
from ..data.quadruplets import QuadrupletEmbeddings
from ..embeddings import bank_from, embed_quadruplets
from ..evaluate import Task
from ..evaluate.metrics import Labels, retrieval
from ..models import ClipModel
from ..ops import nearest_safe
from ..results import PAGE, UNSAFE_FOUND, UNSAFE_RATE, at
from ..train.dataset import open_data, split_rows
from .result import Figures

MOST = 800  # rows: a random part of a larger training set
# figure -> who asks; also further down: which of a class's captions comes first says little where they name no more
HELD = {
    at(name, k): part
    for name, part in {"S-V.text_to_image": "safe_text", "S-V.image_to_text": "safe_image"}.items()
    for k in (1, 5, 10)
}
RATE = at(UNSAFE_RATE)


@dataclass
class Replay:
    """Rows of the training set, as the frozen model embeds them."""

    data: QuadrupletDataset
    rows: QuadrupletEmbeddings  # [N, d], of unit length or not
    bank: SafeBank  # their safe side
    labels: Labels


def open_replay(config: Config, source: str | None, clip: ClipModel) -> QuadrupletDataset:
    """At most MOST rows that the run was trained on, or of `source`, the same ones for a run's seed.

    Raises ConfigError where the training data is not there any more.
    """
    config = copy.deepcopy(config)
    if source is not None:
        config.data.val_fraction, config.data.val = 0.0, ""
    try:
        opened = open_data(config, source or config.data.train, clip)
    except (DataError, OSError, ValueError) as error:
        if source is not None:
            raise
        raise ConfigError(
            f"the run's training data, which a patch goes over again, cannot be read ({error}): name where it is now, "
            "or other quadruplets of the kinds that it knows, with --replay SOURCE"
        ) from error
    rows, _ = split_rows(len(opened), 0.0 if config.data.val else config.data.val_fraction, config.seed)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(config.seed))[:MOST]
    chosen = rows[order.sort().values].tolist()
    policy = ErrorPolicy("raise", f"{source or config.data.train}, replayed")
    policy.summary.read = len(chosen)
    records = [opened.records[row] for row in chosen]
    return QuadrupletDataset(records, clip.preprocess, policy, config.data.max_pixels, opened.text_only)


def embed_replay(frozen: ClipModel, data: QuadrupletDataset, cache_dir: str, options: dict[str, Any]) -> Replay:
    """The rows of `data` under `frozen`, the model that the run started from; kept in `cache_dir`."""
    found = embed_quadruplets(frozen, data, cache_dir, title="embed replayed quadruplets", **options)
    rows = QuadrupletEmbeddings(*(x.to(frozen.device) for x in found.embeddings))
    return Replay(data, rows, bank_from(found).to(frozen.device).pack(), Task(data).labels)


class Measured(NamedTuple):
    """What a patch changes and what it should not, all of it on training data."""

    figures: Figures
    queries: Mapping[str, int]  # of a held figure: how many different ones there are


def measured(replayed: QuadrupletEmbeddings, labels: Labels, pairs: QuadrupletEmbeddings, unsafe: Tensor) -> Measured:
    """The figures of a model.

    Args:
        replayed: [N, d] rows of it; `labels` are theirs.
        pairs: [P, d] rows of the pairs; `unsafe` bool [P, 2]: which of their texts, and of their images.
    """
    found = retrieval(replayed, labels)
    rates = [found[at(name)].mean for name in UNSAFE_FOUND if at(name) in found]
    held = ({RATE: statistics.mean(rates)} if rates else {}) | {name: found[name].mean for name in HELD}
    counts = {part: len(getattr(labels.contents, part).unique()) for part in ("safe_text", "safe_image")}
    queries = {name: counts[HELD[name]] if name in HELD else sum(counts.values()) for name in held}
    return Measured({f"pairs.{RATE}": _pairs_found(replayed, pairs, unsafe)} | held, queries)


def losses(before: Measured, after: Measured, max_loss: float) -> Figures:
    """By how much each held figure is worse, of those that can show a loss of `max_loss`.

    Equal queries find the same: of 40 captions for 800 pictures, one that changes moves a figure by two points. So a
    figure counts where a query is at most `max_loss` of it.
    """
    sign = {name: 1 if name == RATE else -1 for name, count in before.queries.items() if count * max_loss >= 1}
    return {name: sign[name] * (after.figures[name] - before.figures[name]) for name in sign}


def _pairs_found(replayed: QuadrupletEmbeddings, pairs: QuadrupletEmbeddings, unsafe: Tensor) -> float:
    """The mean of the four rates of finding a pair's unsafe side among the first PAGE, of these and safe items."""
    text, image = (torch.cat(sides) for sides in zip(replayed[:2], pairs[:2], strict=True))
    bad_text, bad_image = pairs.unsafe_text[unsafe[:, 0]], pairs.unsafe_image[unsafe[:, 1]]
    rates = []
    for queries, bad_queries, items, bad_items in (
        (text, bad_text, image, bad_image),
        (image, bad_image, text, bad_text),
    ):
        gallery = F.normalize(torch.cat([items, bad_items]), dim=-1)
        for asked in (queries, bad_queries):
            if len(asked) and len(bad_items):
                found = nearest_safe(asked, gallery, min(PAGE, len(gallery))).indices
                rates.append(float((found >= len(items)).any(1).double().mean()))
    return statistics.mean(rates) if rates else 0.0
