"""Labels between 0 and 1: a run weighs by them, or says which objective does."""

import json

import pytest

import saferclip_fast as sf
from saferclip_fast import data
from saferclip_fast.config import ConfigError

OPTIONS = {
    "train.epochs": 1,
    "train.batch_size": 8,
    "data.val_fraction": 0.25,
    "objective.k": 4,
    "objective.guard_k": 4,
    "data.num_workers": 0,
    "log.progress": False,
}


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """Scenes with a score for each text and image of the unsafe side."""
    folder = tmp_path_factory.mktemp("table")
    scenes = data.open_quadruplets("scenes:n=32,size=32")
    rows = [{**vars(record), "unsafe_text_label": i / 31} for i, record in enumerate(scenes.records)]
    data.open_rows(rows, folder, progress=False)
    (path,) = folder.glob("*.jsonl")
    return path


def fitted(table, folder, **options):
    given = {**OPTIONS, "data.cache_dir": str(folder / "cache"), **options}
    tuned = sf.fine_tune("ViT-tiny-8-32", str(table), options=given, run_dir=folder / "run")
    lines = [json.loads(line) for line in (folder / "run" / "log.jsonl").read_text().splitlines()]
    return tuned, [line for line in lines if "kept_text" in line or "uni_text" in line]


def test_a_run_weighs_by_scores_and_is_evaluated_with_labels_of_half(table, tmp_path):
    tuned, lines = fitted(table, tmp_path)
    assert lines and all(line["kept_text"] > 0 or line["step"] < 2 for line in lines)
    found = sf.evaluate(tuned, data=str(table))
    cells = {(row["text_is_unsafe"], row["image_is_unsafe"]): row["rows"] for row in found.json["safe_unsafe_table"]}
    assert cells == {(0, 1): 16, (1, 1): 16}


@pytest.mark.parametrize("name", ["safeclip", "shieldclip"])
def test_an_objective_that_cannot_weigh_says_so_with_file_and_row(table, tmp_path, name):
    message = rf"{table.name}, row 2: objective.name={name} takes labels of 0 and 1, got 0.0322581 .text. and 1 .image."
    with pytest.raises(ConfigError, match=message):
        fitted(table, tmp_path, **{"objective.name": name})
