"""A table's rows with the label that a classifier gives each unsafe image."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm import tqdm

from ..data import DataError, ImageError, ImageFile
from ..data.images import MAX_PIXELS, resolve_inside
from ..data.readers.rows import column_names
from ..data.readers.tables import read_rows
from ..data.readers.visu import check_pattern, entries, read_json, unsafe_name
from ..storage.files import atomic_write, save_json
from .classifiers import THRESHOLD, ImageClassifier, probabilities

SCORE = "unsafe_image_score"
SUFFIXES = (".csv", ".tsv", ".jsonl", ".ndjson", ".json")


@dataclass
class LabelCounts:
    """How many images of a table were found unsafe and safe, and how many could not be read."""

    unsafe: int = 0
    safe: int = 0
    broken: int = 0

    def __str__(self) -> str:
        text = f"{self.unsafe} unsafe images, {self.safe} safe ones"
        return text + (f", {self.broken} that cannot be read, left without a label" if self.broken else "")


def label_table(
    table: str | Path,
    out: str | Path,
    classifier: ImageClassifier,
    *,
    root: str | Path | None = None,
    columns: Mapping[str, str] | None = None,
    unsafe_image: str | None = None,
    allow_absolute: bool = False,
    threshold: float = THRESHOLD,
    batch_size: int = 16,
    max_pixels: int = MAX_PIXELS,
    progress: bool = True,
) -> LabelCounts:
    """Write `out`, the rows of `table` with `unsafe_image_label` (1 where the probability reaches `threshold`) and
    `unsafe_image_score`, the probability itself; other columns stay as they are.

    root: folder of the unsafe images (default: the table's). unsafe_image: their name where an entry of a .json file
    (ViSU, NSFWCaps) has none. columns, allow_absolute, max_pixels: as in data.open_quadruplets. An image that cannot be
    read gets no label, which readers take as unsafe. `out` appears whole or not at all; a killed run goes on where it
    was (OUT.scores.jsonl).

    Raises DataError for a table that cannot be read, ValueError for formats or names that do not fit.
    """
    table, out = Path(table), Path(out)
    for path in (table, out):
        if path.suffix.lower() not in SUFFIXES or path.suffix.lower() != table.suffix.lower():
            raise ValueError(f"{path}: {table} and the new table must be of one format of {', '.join(SUFFIXES)}")
    if out.exists() and table.exists() and out.samefile(table):
        raise ValueError(f"{out} is the table itself: name a new file")
    if columns and _is_json(table):
        raise ValueError(f"{table}: entries of a .json have names of their own, and columns are those of other tables")
    names = column_names(columns)
    rows, files, content = _read_json(table, unsafe_image) if _is_json(table) else _read_table(table, names)
    images = [_locate(file, root or table.parent, allow_absolute) for file in files]
    known = _Scores(out.with_name(out.name + ".scores.jsonl"))
    todo = sorted({image for image in images if image is not None} - set(known.scores), key=str)
    with tqdm(total=len(todo), desc="classify images", disable=not progress) as bar:
        for start in range(0, len(todo), batch_size):
            block = todo[start : start + batch_size]
            known.add(_classify(classifier, block, max_pixels))
            bar.update(len(block))
    counts = LabelCounts()
    for row, image in zip(rows, images, strict=True):
        score = known.scores.get(image) if image is not None else None
        row[SCORE] = "" if score is None else round(score, 4)
        row[names["unsafe_image_label"]] = "" if score is None else int(score >= threshold)
        counts.broken += score is None
        counts.unsafe += score is not None and score >= threshold
        counts.safe += score is not None and score < threshold
    _write(out, rows, content)
    known.path.unlink(missing_ok=True)
    return counts


def _is_json(path: Path) -> bool:
    return path.suffix.lower() == ".json"


# Rows, each one's unsafe image, and the content of a file that is no list of rows, in which they lie.
Rows = tuple[list[dict[str, Any]], list[Any], Any]


def _read_table(table: Path, names: Mapping[str, str]) -> Rows:
    rows = []
    try:
        for number, row in read_rows(table, names):
            if isinstance(row, str):
                raise DataError(f"{table}, row {number}: {row} (repair it: a row that cannot be read cannot be kept)")
            rows.append(row)
    except OSError as error:
        raise DataError(f"cannot read {table}: {error.strerror or error}") from error
    if not rows:
        raise DataError(f"{table} has no row")
    return rows, [row.get(names["unsafe_image"]) for row in rows], None


def _read_json(table: Path, unsafe_image: str | None) -> Rows:
    check_pattern(unsafe_image)
    content = read_json(table)
    found = entries(content, table)
    for key, entry in found:
        if not isinstance(entry, dict):
            raise DataError(f"{table}, entry {key!r} must be an object, not {type(entry).__name__}")
    return [entry for _, entry in found], [unsafe_name(key, entry, unsafe_image) for key, entry in found], content


def _locate(name: Any, root: str | Path, allow_absolute: bool) -> ImageFile | None:
    try:
        return ImageFile(resolve_inside(root, name, allow_absolute))
    except ImageError:
        return None


def _classify(classifier: ImageClassifier, block: Sequence[ImageFile], max_pixels: int) -> dict[ImageFile, float]:
    """The probability of each image that can be read."""
    loaded: dict[ImageFile, Image.Image] = {}
    for image in block:
        try:
            loaded[image] = image.load(max_pixels)
        except ImageError as error:
            print(f"no label: {error}", file=sys.stderr)
    return dict(zip(loaded, probabilities(classifier, list(loaded.values())), strict=True)) if loaded else {}


class _Scores:
    """Scores so far, on disk after each batch; those of files that have changed since are forgotten."""

    def __init__(self, path: Path) -> None:
        self.path, self.scores = path, dict[ImageFile, float]()
        for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
            try:
                found = json.loads(line)
                image, stamp, score = ImageFile(found["path"]), found["stamp"], float(found["score"])
                if image.stamp() == stamp:
                    self.scores[image] = score
            except (ValueError, KeyError, TypeError):
                continue  # a torn line, or a file that is gone, costs one image again

    def add(self, scores: Mapping[ImageFile, float]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            for image, score in scores.items():
                # the line break comes first, so that a line torn by a kill stays alone
                file.write("\n" + json.dumps({"path": image.path, "stamp": image.stamp(), "score": score}))
        self.scores.update(scores)


def _write(out: Path, rows: Sequence[Mapping[str, Any]], content: Any) -> None:
    if _is_json(out):
        save_json(out, content)
        return
    # bytes that are no UTF-8 were read as surrogates and go back as they were
    options: dict[str, Any] = {"encoding": "utf-8", "errors": "surrogateescape", "newline": ""}
    with atomic_write(out) as temporary, temporary.open("w", **options) as file:
        if out.suffix.lower() in (".jsonl", ".ndjson"):
            file.writelines(json.dumps(row) + "\n" for row in rows)
            return
        writer = csv.DictWriter(file, list(rows[0]), delimiter="\t" if out.suffix.lower() == ".tsv" else ",")
        writer.writeheader()
        writer.writerows(rows)
