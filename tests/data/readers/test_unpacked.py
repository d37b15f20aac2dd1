"""Compressed tables: the samples of the plain file; a damaged one, or a line without end, is refused by name."""

import gzip
import json
from pathlib import Path

import pyarrow as pa
import pytest

from saferclip_fast.data import DataError, open_quadruplets
from saferclip_fast.data.readers import unpacked
from tests.data.readers.test_tables import write_table


def pack(path: Path, suffix: str) -> Path:
    packed = path.with_name(path.name + suffix)
    if suffix == ".gz":
        packed.write_bytes(gzip.compress(path.read_bytes()))
    else:
        with pa.output_stream(str(packed), compression="zstd") as file:
            file.write(path.read_bytes())
    path.unlink()
    return packed


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
@pytest.mark.parametrize("table", [".csv", ".tsv", ".jsonl", ".ndjson"])
def test_a_compressed_table_gives_the_same_samples(tmp_path, rows, table, suffix):
    rows[1]["safe_text"] = "ein rötlicher Stern,\nzweizeilig" if table != ".tsv" else "ein rötlicher Stern"
    wanted = open_quadruplets(write_table(tmp_path / f"reference{table}", rows))
    found = open_quadruplets(pack(write_table(tmp_path / f"data{table}", rows), suffix))
    assert found.content_hash() == wanted.content_hash()
    assert [r.row for r in found.records] == [r.row for r in wanted.records]
    assert found.records[0].file == str(tmp_path / f"data{table}{suffix}")


def test_visu_may_be_compressed(tmp_path, rows):
    (tmp_path / "000000000007.jpg").write_bytes((tmp_path / rows[0]["safe_image"]).read_bytes())
    entry = {"safe": "a", "nsfw": "b", "coco_id": 7, "nsfw_im_path": rows[0]["unsafe_image"]}
    (tmp_path / "visu.json").write_text(json.dumps({"0": entry}))
    data = open_quadruplets(pack(tmp_path / "visu.json", ".gz"), root=tmp_path)
    assert data.records[0].unsafe_text == "b"


def test_utf_16_inside(tmp_path, rows):
    path = write_table(tmp_path / "data.csv", rows)
    path.write_bytes(path.read_text().encode("utf-16"))
    assert len(open_quadruplets(pack(path, ".gz"))) == 4


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
@pytest.mark.parametrize("table", [".csv", ".jsonl"])
@pytest.mark.parametrize("damage", [lambda data: b"plain text", lambda data: data[: len(data) // 2]])
def test_a_file_that_cannot_be_unpacked_is_named(tmp_path, rows, table, suffix, damage):
    path = pack(write_table(tmp_path / f"data{table}", rows * 50), suffix)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(
        DataError, match=rf"cannot unpack .*data{table}{suffix}: .* \(a download cut short\?\)"
    ) as caught:
        open_quadruplets(path, on_error="skip")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("table", [".csv", ".jsonl"])
def test_a_line_without_end_does_not_fill_the_memory(tmp_path, rows, table, monkeypatch):
    path = write_table(tmp_path / f"data{table}", rows)
    path.write_text(path.read_text() + "x" * 5000)
    monkeypatch.setattr(unpacked, "MAX_LINE", 4096)
    number = {".csv": 6, ".jsonl": 5}[table]
    with pytest.raises(DataError, match=rf"row {number}: a line of more than 4096 characters"):
        open_quadruplets(pack(path, ".gz"), on_error="skip")


def test_another_suffix_before_it_is_refused(tmp_path):
    (tmp_path / "data.parquet.gz").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"cannot tell the format of .*texts may end in .gz or .zst"):
        open_quadruplets(tmp_path / "data.parquet.gz")
