"""CSV, TSV, JSON Lines and Parquet: the same samples from each, and every bad row reported with file and row."""

import csv
import json
import string
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from saferclip_fast.data import DataError, QuadrupletDataset, open_quadruplets
from tests.support.quadruplet_files import image_bytes, write_rows

FIELDS = ("safe_image", "unsafe_image", "safe_text", "unsafe_text")


def write_table(path: Path, rows: list[dict]) -> Path:
    if path.suffix == ".parquet":
        pa = pytest.importorskip("pyarrow")
        import pyarrow.parquet as pq

        pq.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix in (".csv", ".tsv"):
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0].keys(), delimiter="\t" if path.suffix == ".tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)
    else:
        write_rows(path, rows)
    return path


def captions(data: QuadrupletDataset) -> list[tuple[str, str]]:
    return [(record.safe_text, record.unsafe_text) for record in data.records]


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".ndjson", ".parquet"])
def test_every_format_gives_the_same_samples(tmp_path: Path, rows: list[dict], suffix: str) -> None:
    for row in rows:
        row.update(unsafe_text_label=1, unsafe_image_label=0, note="ignored")
    data = open_quadruplets(write_table(tmp_path / f"data{suffix}", rows))
    reference = open_quadruplets(write_table(tmp_path / "reference.jsonl", rows))
    assert data.content_hash() == reference.content_hash()
    assert len(data) == 4 and data.summary.read == data.summary.kept == 4
    assert data[2]["safe_text"] == "a red circle number 2" and data[2]["unsafe_text"] == "a red circle number 2 on fire"
    assert data[2]["safe_image"].shape == (3, 10, 12)
    assert (data[2]["unsafe_text_label"], data[2]["unsafe_image_label"]) == (1, 0)


def test_column_names_root_and_quoting(tmp_path: Path, rows: list[dict]) -> None:
    renamed = [
        {"img": r["safe_image"], "bad_img": r["unsafe_image"], "cap": 'a "red", star\nshining', "bad": "b"}
        for r in rows
    ]
    (tmp_path / "tables").mkdir()
    path = write_table(tmp_path / "tables" / "data.csv", renamed)
    columns = {"safe_image": "img", "unsafe_image": "bad_img", "safe_text": "cap", "unsafe_text": "bad"}
    data = open_quadruplets(path, root=tmp_path, columns=columns)
    assert captions(data) == [('a "red", star\nshining', "b")] * 4
    assert [record.row for record in data.records] == [2, 4, 6, 8]  # lines of the file: captions span two
    with pytest.raises(ValueError, match=r"columns renames \['caption'\]"):
        open_quadruplets(path, columns={"caption": "cap"})


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_a_missing_column_is_fatal_and_lists_what_is_there(tmp_path: Path, rows: list[dict], suffix: str) -> None:
    for row in rows:
        row["caption"] = row.pop("safe_text")
    path = write_table(tmp_path / f"data{suffix}", rows)
    with pytest.raises(DataError, match=r"has no column 'safe_text'; its columns are \[.*'caption'\]"):
        open_quadruplets(path, on_error="skip")


BAD_FIELDS = {
    "missing image": ({"unsafe_image": "images/none.png"}, "unsafe_image: missing image .*none.png: No such file"),
    "leaves root": ({"safe_image": "../x.png"}, "safe_image: image path '../x.png' leaves its root folder"),
    "absolute": ({"safe_image": "/etc/hostname"}, "safe_image: absolute image path '/etc/hostname'"),
    "no path": ({"safe_image": ""}, "safe_image: image path is empty"),
    "empty caption": ({"safe_text": " \t"}, "safe_text is empty"),
    "empty unsafe caption": ({"unsafe_text": ""}, "unsafe_text is empty"),
    "bad label": (
        {"unsafe_text_label": "maybe"},
        r"unsafe_text_label must lie between 0 \(safe\) and 1 \(unsafe\), not 'maybe'",
    ),
    "label 2": ({"unsafe_image_label": "2"}, "unsafe_image_label must lie between 0"),
    "label under 0": ({"unsafe_image_label": "-1e-9"}, "unsafe_image_label must lie between 0"),
    "label over 1": ({"unsafe_text_label": "1.0001"}, "unsafe_text_label must lie between 0"),
    "label with an underscore": ({"unsafe_text_label": "0_1"}, "unsafe_text_label must lie between 0"),
    "infinite label": ({"unsafe_text_label": "inf"}, "unsafe_text_label must lie between 0"),
}


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
@pytest.mark.parametrize("case", BAD_FIELDS)
def test_bad_fields_name_file_and_row(tmp_path: Path, rows: list[dict], suffix: str, case: str) -> None:
    change, message = BAD_FIELDS[case]
    for row in rows:
        row.update(unsafe_text_label="1", unsafe_image_label="1")
    rows[2].update(change)
    path = write_table(tmp_path / f"data{suffix}", rows)
    number = 4 if suffix == ".csv" else 3  # the CSV's header is line 1
    with pytest.raises(DataError, match=rf'data{suffix}, row {number}: {message}.*on_error="skip"'):
        open_quadruplets(path)
    data = open_quadruplets(path, on_error="skip", progress=False)
    assert len(data) == 3 and data.summary.read == 4 and data.summary.skipped == 1
    assert sum(data.summary.reasons.values()) == 1
    assert f"row {number}" in data.summary.problems[0]
    assert [text for text, _ in captions(data)] == [f"a red circle number {i}" for i in (0, 1, 3)]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"safe_text": ', "not JSON"),
        (b"[1, 2]", "must be a JSON object, not list"),
        (b"\xff\xfe", "not JSON.*utf-8"),
        (b"[" * 100_000, "not JSON"),
        (b"1" * 5000, "not JSON|must be a JSON object"),
        (b"{}", "no safe_image"),
        (b'{"safe_image": 5, "safe_text": "a"}', "safe_image: image path is empty or not text: 5"),
        (b'{"safe_image": "images/safe0.png", "safe_text": 5}', "safe_text must be text, not int"),
        (b'{"safe_image": "images/safe0.png", "safe_text": "\\ud800"}', "safe_text is not valid UTF-8"),
        (b'{"safe_image": "a\\u0000b"}', "zero byte"),
    ],
)
def test_bad_json_lines(tmp_path: Path, rows: list[dict], line: bytes, message: str) -> None:
    path = write_rows(tmp_path / "data.jsonl", rows[:2])
    path.write_bytes(path.read_bytes() + b"\n" + line + b"\n" + json.dumps(rows[2]).encode())
    with pytest.raises(DataError, match=rf"data.jsonl, row 4: .*({message})"):
        open_quadruplets(path)
    data = open_quadruplets(path, on_error="skip", progress=False)
    assert len(data) == 3 and data.summary.skipped == 1


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"a,b", "has 2 cells where the header has 4"),
        (b"a,b,c,d,e", "has 5 cells where the header has 4"),
        (b'images/safe0.png,images/unsafe0.png,"a"b,c', "expected after"),
        (b"images/safe0.png,images/unsafe0.png,caf\xe9,c", "safe_text is not valid UTF-8"),
        (b"images/safe0.png,images/unsafe0.png," + b"x" * 200_000 + b",c", "field larger than field limit"),
    ],
)
def test_bad_csv_lines(tmp_path: Path, rows: list[dict], line: bytes, message: str) -> None:
    path = write_table(tmp_path / "data.csv", rows)
    path.write_bytes(path.read_bytes() + line + b"\r\n\r\n" + ",".join(rows[0].values()).encode())
    with pytest.raises(DataError, match=rf"data.csv, row 6: .*{message}"):
        open_quadruplets(path)
    data = open_quadruplets(path, on_error="skip", progress=False)
    assert len(data) == 5 and data.summary.skipped == 1 and data.summary.read == 6


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.csv", b"", "empty.csv is empty: a header line is needed"),
        ("header.csv", b",".join(f.encode() for f in FIELDS), "no usable quadruplet in .*header.csv: 0 rows read"),
        ("empty.jsonl", b"", "no usable quadruplet"),
        ("bad.parquet", b"PAR1 not really", "bad.parquet is not a readable Parquet file"),
        ("data.txt", b"x", "cannot tell the format of"),
        ("data.csv.xz", b"x", "cannot tell the format of"),
    ],
)
def test_bad_files(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        open_quadruplets(tmp_path / name)


def test_missing_files_and_bad_options(tmp_path: Path, rows: list[dict]) -> None:
    for name in ("no.csv", "no.jsonl", "no.parquet", "no", "no.tar"):
        with pytest.raises(DataError, match=rf"({name}.*No such file|no such file or folder: .*{name})"):
            open_quadruplets(tmp_path / name)
    with pytest.raises(ValueError, match="on_error must be one of"):
        open_quadruplets(write_rows(tmp_path / "d.jsonl", rows), on_error="ignore")
    with pytest.raises(ValueError, match="max_pixels must be between"):
        open_quadruplets(tmp_path / "d.jsonl", max_pixels=0)


def test_absolute_paths_by_option(tmp_path: Path, rows: list[dict]) -> None:
    rows[0]["safe_image"] = str(tmp_path / rows[0]["safe_image"])
    data = open_quadruplets(write_rows(tmp_path / "d.jsonl", rows), allow_absolute=True)
    assert data[0]["safe_image"].shape == (3, 10, 12)


def test_all_rows_bad_is_fatal_even_when_skipping(tmp_path: Path, rows: list[dict]) -> None:
    for row in rows:
        row["safe_text"] = ""
    path = write_rows(tmp_path / "d.jsonl", rows)
    with pytest.raises(
        DataError, match=r"no usable quadruplet in .*4 rows read, 0 kept, 4 skipped \(4 empty caption\)"
    ):
        open_quadruplets(path, on_error="skip")


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_a_label_that_is_missing_is_1_however_pandas_writes_it(tmp_path: Path, rows: list[dict], suffix: str) -> None:
    for row, label in zip(rows, (float("nan"), 0.0, 1.0, float("nan")), strict=True):
        row["unsafe_image_label"] = label
    data = open_quadruplets(write_table(tmp_path / f"d{suffix}", rows))
    assert [record.unsafe_image_label for record in data.records] == [1, 0, 1, 1]


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_a_label_between_0_and_1_is_kept_and_part_of_the_content(tmp_path: Path, rows: list[dict], suffix: str) -> None:
    hashes = []
    for scores in ((0.0, 0.25, 0.5, 1.0), (0.0, 0.75, 0.5, 1.0)):
        for row, score in zip(rows, scores, strict=True):
            row["unsafe_image_label"] = score
        data = open_quadruplets(write_table(tmp_path / f"{scores[1]}{suffix}", rows))
        assert [record.unsafe_image_label for record in data.records] == list(scores)
        assert [record.image_is_unsafe for record in data.records] == [score >= 0.5 for score in scores]
        hashes.append(data.content_hash())
    assert hashes[0] != hashes[1]


def test_a_path_that_is_no_text_is_shown_short(tmp_path: Path, rows: list[dict]) -> None:
    rows[0]["safe_image"] = ["x" * 5000]
    with pytest.raises(DataError, match="image path is empty or not text") as error:
        open_quadruplets(write_rows(tmp_path / "d.jsonl", rows))
    assert len(str(error.value)) < 400


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_a_renamed_label_column_must_be_there(tmp_path: Path, rows: list[dict], suffix: str) -> None:
    path = write_table(tmp_path / f"d{suffix}", rows)
    with pytest.raises(DataError, match=r"has no .*'image_label'"):
        open_quadruplets(path, columns={"unsafe_image_label": "image_label"})
    assert len(open_quadruplets(path, columns={"unsafe_image_label": "unsafe_image_label"})) == 4


def test_two_fields_of_one_column_are_refused(tmp_path: Path, rows: list[dict]) -> None:
    path = write_rows(tmp_path / "d.jsonl", rows)
    with pytest.raises(ValueError, match="columns gives 'unsafe_text' to two fields"):
        open_quadruplets(path, columns={"safe_text": "unsafe_text"})


def test_a_name_that_stands_twice_in_a_line_of_json_is_refused(tmp_path: Path, rows: list[dict]) -> None:
    path = write_rows(tmp_path / "d.jsonl", rows)
    path.write_text(path.read_text() + json.dumps(rows[0])[:-1] + ', "safe_text": "b"}\n')
    with pytest.raises(DataError, match="row 5: not JSON: the name 'safe_text' stands twice"):
        open_quadruplets(path)


def test_a_path_of_windows_is_named(tmp_path: Path, rows: list[dict]) -> None:
    rows[0]["safe_image"] = rows[0]["safe_image"].replace("/", "\\")
    with pytest.raises(DataError, match=r"row 1: safe_image: missing image .*a path of Windows\? write / between"):
        open_quadruplets(write_rows(tmp_path / "d.jsonl", rows))


values = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8), st.lists(st.integers(), max_size=2)
)
paths = st.text(alphabet=string.ascii_letters + "./\\\0 é", max_size=12)
good = st.just("images/safe0.png")


@given(st.lists(st.fixed_dictionaries({}, optional={
    "safe_image": good | paths | values, "unsafe_image": good | paths | values,
    "safe_text": values, "unsafe_text": values, "unsafe_text_label": values, "unsafe_image_label": values,
}), max_size=5))  # fmt: skip
@settings(max_examples=150, deadline=None)
def test_malformed_rows_are_counted_and_never_crash(tmp_path_factory, drawn: list[dict]) -> None:
    folder = tmp_path_factory.mktemp("fuzz")
    (folder / "images").mkdir()
    (folder / "images" / "safe0.png").write_bytes(image_bytes(0))
    sure = dict(zip(FIELDS, ("images/safe0.png", "images/safe0.png", "a star", "a star on fire"), strict=True))
    data = open_quadruplets(write_rows(folder / "d.jsonl", [*drawn, sure]), on_error="skip", progress=False)
    summary = data.summary
    assert summary.read == len(drawn) + 1 and summary.kept == len(data)
    assert sum(summary.reasons.values()) == summary.skipped == len(summary.problems)
    assert all(
        f"d.jsonl, row {row}: " in problem
        for row, problem in zip(skipped_rows(data, len(drawn)), summary.problems, strict=True)
    )
    for record in data.records:
        assert record.safe_text.strip() and record.unsafe_text.strip()
        assert {record.unsafe_text_label, record.unsafe_image_label} <= {0, 1}


def skipped_rows(data: QuadrupletDataset, count: int) -> list[int]:
    kept = {record.row for record in data.records}
    return [row for row in range(1, count + 1) if row not in kept]


@given(st.binary(max_size=200))
@settings(max_examples=150, deadline=None)
def test_arbitrary_bytes_give_a_data_error(tmp_path_factory, content: bytes) -> None:
    folder = tmp_path_factory.mktemp("bytes")
    for name in ("d.csv", "d.jsonl", "d.parquet", "d.tar", "d.json"):
        (folder / name).write_bytes(content)
        with pytest.raises(DataError):
            open_quadruplets(folder / name, on_error="skip", root=folder, progress=False)
