"""A model's figures beside those of a published table, as that table defines them."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from ..config import Config, DataOptions, Given, load_config, pairs
from ..data.errors import DataError
from ..data.images import ImageFile
from ..data.labeled import LabeledImages, open_labeled, readable_images
from ..data.open import check_source
from ..models import ClipModel
from ..results import TABLE_FORMAT
from ..storage.claim import claim
from ..storage.files import check_writable, save_json
from ..train.device import set_up_torch, settings_kept
from .bootstrap import CONFIDENCE, RESAMPLES
from .call import Model, open_models
from .held_out import HeldOut, open_held_out, read_config
from .measurement import check_same_space, measure
from .metrics import Metric
from .published import (
    CLIP_BENCHMARK,
    READING,
    Table,
    TableData,
    check_left,
    data_sets,
    measurable,
    missing_of,
    read_table_data,
    table_named,
)
from .result import Estimate
from .summary import estimates
from .tables import published_lines
from .task import Settings, Task

PERCENT = 100
_WHOLE = ("images.", "zero_shot")  # metrics of images; those of retrieval belong to one set of quadruplets


class TableRow(NamedTuple):
    """A figure of a published table and ours, in percent."""

    label: str
    wanted: str | None  # where it should go: "falls", "rises", "stays"
    published: Mapping[str, float | None]  # by model; None: not known to us
    absent: str  # why there is none of ours, "" where there is
    samples: int = 0
    tuned: Estimate | None = None
    frozen: Estimate | None = None
    change: Estimate | None = None


@dataclass(frozen=True)
class PublishedTable:
    """What `published_table` found; `print` shows the published figures beside ours.

    Attributes:
        name: of the table.
        rows: its figures, in the paper's order.
        missing: data set -> why it was left out.
        out: the file that was written, if one was.
        json: the content of that file.
    """

    name: str
    rows: tuple[TableRow, ...]
    missing: Mapping[str, str]
    out: Path | None = None
    json: Mapping[str, Any] = field(default_factory=dict, repr=False)

    def __str__(self) -> str:
        return published_lines(self.json)


def published_table(
    model: Model,
    name: str,
    table_data: TableData,
    *,
    frozen: Model | None = None,
    out: str | os.PathLike | None = None,
    options: Given = (),
    device: str = "auto",
    precision: str = "fp32",
    batch_size: int = 256,
    samples: int = RESAMPLES,
    seed: int = 0,
    progress: bool = True,
) -> PublishedTable:
    """Measure a CLIP as a published table does, on your own copies of its data, and set both side by side.

    Args:
        model, frozen: as `evaluate_model` takes them.
        name: of the table: "safer-clip", "safe-clip", "shieldclip-retrieval", "shieldclip-zeroshot".
        table_data: where its data sets lie: a YAML file of lines SET: PATH, or a mapping (docs/evaluation.md). What is
            not there is left out and named.
        out: folder for table-NAME.json; None writes nothing.
        options: how quadruplets are read, `data.*` of training.
        device, precision, batch_size, samples, seed, progress: as in `evaluate_model`.

    Returns:
        A PublishedTable: `result.rows[0].tuned.value` in percent, `print(result)`.

    Raises:
        ConfigError: no such table or data set, or nothing of it is there.
        FileNotFoundError, DataError, ValueError: a model or data that is not there or of another kind.
        FrozenModelError: the run's frozen model is not the one that it was tuned from.
        InUseError: another process writes to `out`.
    """
    table, given = table_named(name), read_table_data(table_data)
    missing = missing_of(table, given)
    check_left(table, missing)
    path = model if isinstance(model, ClipModel) else os.fspath(model)
    folder = None if out is None else Path(out)
    configs = _configs(path if isinstance(path, str) else "", options, given, progress)
    torch_config = load_config(None, {"device": device, "seed": seed}, "options")
    with claim(folder) if folder else contextlib.nullcontext(), settings_kept():
        place = set_up_torch(torch_config)
        labeled, images = _open_images(table, given, missing, configs[""], progress)
        check_left(table, missing)
        tuned, beside = open_models(path, frozen, place)
        if beside is not None:
            check_same_space(tuned, beside)
        wanted = _wanted(table, missing)
        held_out = {key: _quadruplets(configs[key], tuned) for key in wanted if _kind(key) == "quadruplets"}
        settings = Settings(
            cache_dir=configs[""].data.cache_dir,
            batch_size=batch_size,
            num_workers=configs[""].data.num_workers,
            precision=precision,
            resamples=samples,
            seed=seed,
            progress=progress,
        )
        tasks = _tasks(held_out, labeled, images)
        clips = {"tuned": tuned} if beside is None else {"frozen": beside, "tuned": tuned}
        sides = {key: _measured(clip, tasks, settings, key) for key, clip in clips.items()}
    found = _described(table, missing, held_out, labeled, clips, estimates(sides, settings)) | {
        "settings": {"precision": precision, "resamples": samples, "confidence": CONFIDENCE, "seed": seed}
    }
    file = folder and folder / f"table-{table.name}.json"
    if file:
        save_json(file, found)
    return PublishedTable(table.name, tuple(map(_row, found["rows"])), missing, file, found)


def _configs(model: str, options: Given, given: Mapping[str, Mapping[str, Any]], progress: bool) -> dict[str, Config]:
    """By set of quadruplets, and under "" for the rest: how it is read. Of a run's own options those of READING go."""
    plain, configs = DataOptions(), {}
    for name in ("", *(name for name in given if _kind(name) == "quadruplets")):
        entry = given.get(name, {"source": ""})
        places = {key: entry.get(key, getattr(plain, key)) for key in READING}
        chosen = {f"data.{key}": value for key, value in places.items()} | {"data.val": entry["source"]}
        configs[name] = read_config(model, dict(pairs(options)) | chosen)
        configs[name].log.progress = progress
        if name:
            check_source(entry["source"], places["root"] or None)
    check_writable(configs[""].data.cache_dir, "data.cache_dir")
    return configs


def _wanted(table: Table, missing: Mapping[str, str]) -> list[str]:
    """The data sets of the rows that can be measured."""
    return list(dict.fromkeys(name for row in table.rows if measurable(row, missing) for name in row.needs))


def _kind(name: str) -> str:
    return data_sets()[name].kind


def _open_images(
    table: Table, given: Mapping[str, Mapping[str, Any]], missing: dict[str, str], config: Config, progress: bool
) -> tuple[list[LabeledImages], dict[str, Sequence[ImageFile]]]:
    """Labeled sets, and folders of images by name. A set that clip_benchmark does not find is added to `missing`."""
    labeled: list[LabeledImages] = []
    images: dict[str, Sequence[ImageFile]] = {}
    for name in _wanted(table, missing):
        if _kind(name) == "quadruplets":
            continue
        source = given[name]["source"]
        if _kind(name) == "images":
            images[name] = readable_images(source, config.data.on_error, progress)
            continue
        try:
            labeled.append(open_labeled(source, name))
        except DataError as error:
            if not source.startswith(CLIP_BENCHMARK):
                raise
            missing[name] = str(error)
    return labeled, images


def _quadruplets(config: Config, clip: ClipModel) -> HeldOut:
    found = open_held_out(config, clip)
    assert found is not None, "data.val is given"
    return found


def _tasks(
    held_out: Mapping[str, HeldOut], labeled: Sequence[LabeledImages], images: Mapping[str, Sequence[ImageFile]]
) -> dict[str, Task]:
    """What is measured, by set of quadruplets; under "" what needs none."""
    tasks = {name: Task(quadruplets=found.quadruplets) for name, found in held_out.items()}
    if images:
        distractors = images.get("distractors", ())
        real = {name: files for name, files in images.items() if name != "distractors"}
        tasks["visu"].images, tasks["visu"].distractors = real, distractors
        tasks["visu"].captions = held_out["visu"].captions
    return tasks | ({"": Task(zero_shot=labeled)} if labeled else {})


def _measured(clip: ClipModel, tasks: Mapping[str, Task], settings: Settings, called: str) -> dict[str, Metric]:
    """Every metric by the name that rows have for it."""
    found = {}
    for name, task in tasks.items():
        text_only = task.quadruplets is not None and task.quadruplets.text_only
        for metric, values in measure(clip, task, settings, called).metrics.items():
            if metric.startswith(_WHOLE):
                found[metric] = values
            elif not text_only or metric.startswith("S-V."):  # a pool without unsafe images is none of the paper's
                found[f"{name}/{metric}"] = values
    return found


def _described(
    table: Table,
    missing: Mapping[str, str],
    held_out: Mapping[str, HeldOut],
    labeled: Sequence[LabeledImages],
    clips: Mapping[str, ClipModel],
    metrics: Mapping[str, Mapping[str, Any]],
) -> dict[str, Any]:
    """The content of table-NAME.json."""
    rows = []
    for row in table.rows:
        entry: dict[str, Any] = {"label": row.label, "metric": row.metric, "wanted": row.wanted, "data": row.needs}
        entry["published"] = {column: row.published.get(column) for column in table.columns}
        lost = [name for name in row.needs if name in missing]
        if lost:
            entry["absent"] = f"without {', '.join(lost)}" if len(lost) < 4 else f"without {len(lost)} of its sets"
        elif row.metric not in metrics:
            entry["absent"] = f"nothing in {row.needs[0]} is an unsafe text, or image, as the search needs"
        else:
            found = metrics[row.metric]
            entry["samples"] = found["samples"]
            for side in ("frozen", "tuned", "change"):
                if side in found:
                    entry[side] = {key: PERCENT * value for key, value in found[side].items()}
        rows.append(entry)
    return {
        "format": TABLE_FORMAT,
        "table": table.name,
        "title": table.title,
        "cited": table.cited,
        "unit": "percent",
        "models": {name: {"name": clip.name, "weights_hash": clip.weights_hash} for name, clip in clips.items()},
        "columns": list(table.columns),
        "rows": rows,
        "differences": [*table.differs, *_own_differences(table, held_out, labeled, clips["tuned"])],
        "missing": {name: {"reason": why, "where": data_sets()[name].where} for name, why in missing.items()},
    }


def _own_differences(
    table: Table, held_out: Mapping[str, HeldOut], labeled: Sequence[LabeledImages], clip: ClipModel
) -> list[str]:
    """Where this model and this data are others than the paper's."""
    found = []
    if not clip.name.startswith(table.model):
        found.append(f"the published models are {table.model}, yours is {clip.name}")
    for name, opened in held_out.items():
        rows, published = len(opened.quadruplets), data_sets()[name].rows
        if published and rows != published:
            found.append(f"{data_sets()[name].title} has {published} quadruplets, yours {rows}")
    for images in labeled:
        count, classes = len(images.class_names), data_sets()[images.name].classes
        if classes and count != classes:
            found.append(f"{data_sets()[images.name].title} has {classes} classes, yours {count}")
    return found


def _row(entry: Mapping[str, Any]) -> TableRow:
    tuned, frozen, change = (
        Estimate(**entry[side]) if side in entry else None for side in ("tuned", "frozen", "change")
    )
    told, absent, samples = entry["published"], entry.get("absent", ""), entry.get("samples", 0)
    return TableRow(entry["label"], entry["wanted"], told, absent, samples, tuned, frozen, change)
