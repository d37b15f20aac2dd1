"""CSV as it comes from spreadsheets and by hand: no line is lost to a stray quote, other separators and encodings."""

from pathlib import Path

import pytest

from saferclip_fast.data import DataError, open_quadruplets
from saferclip_fast.data.readers.csv_rows import read_csv

HEADER = "safe_image,unsafe_image,safe_text,unsafe_text"
NAMES = HEADER.split(",")


def lines_of(path: Path) -> list[tuple[int, list[str] | str]]:
    return list(read_csv(path, NAMES))[1:]


def write(path: Path, lines: list[str]) -> Path:
    path.write_text("\n".join([HEADER, *lines]) + "\n")
    return path


ROWS = [f"safe{i}.png,unsafe{i}.png,a dog {i},a dog {i} on fire" for i in range(1000)]


@pytest.mark.parametrize("second", ["", "opening", "closing"])
def test_a_stray_quote_costs_its_own_line_alone(tmp_path: Path, second: str) -> None:
    rows = list(ROWS)
    rows[9] = rows[9].replace("a dog 9,", '"a dog 9,')
    if second == "opening":
        rows[599] = rows[599].replace("a dog 599,", '"a dog 599,')
    elif second == "closing":
        rows[599] = rows[599].replace("a dog 599,", 'a dog 599",')
    found = lines_of(write(tmp_path / "d.csv", rows))
    bad = {line: cells for line, cells in found if isinstance(cells, str)}
    assert [line for line, _ in found] == list(range(2, 1002))  # every line of the file is there
    assert set(bad) == ({11, 601} if second == "opening" else {11})
    assert bad[11] == "a quote opens here, and line 12 inside it is a row by itself"


def test_a_quote_that_opens_in_the_last_line(tmp_path: Path) -> None:
    found = lines_of(write(tmp_path / "d.csv", [*ROWS[:2], 'a.png,b.png,"x,y']))
    assert found[2] == (4, "a quote opens here and never closes") and len(found) == 3


def test_lines_after_a_record_that_cannot_be_read_are_read(tmp_path: Path) -> None:
    """A caption of two lines, then text after its closing quote; and one with a cell too many."""
    rows = ['a.png,b.png,"two\nlines"x,y', 'a.png,b.png,"two\nlines",y,z', ROWS[0]]
    found = lines_of(write(tmp_path / "d.csv", rows))
    assert [(line, isinstance(cells, str)) for line, cells in found] == [(n, True) for n in (2, 3, 4, 5)] + [(6, False)]


def test_captions_may_hold_line_breaks_and_separators(tmp_path: Path) -> None:
    found = lines_of(write(tmp_path / "d.csv", ['a.png,b.png,"one, two,\nthree\n\nfour","x ""y"""', ROWS[0]]))
    assert found == [(2, ["a.png", "b.png", "one, two,\nthree\n\nfour", 'x "y"']), (6, ROWS[0].split(","))]


EXPORTS = {
    "semicolons": ("utf-8", lambda text: text.replace(",", ";")),
    "tabs": ("utf-8", lambda text: text.replace(",", "\t")),
    "sep": ("utf-8", lambda text: "sep=;\n" + text.replace(",", ";")),
    "sep with a mark": ("utf-8-sig", lambda text: "sep=;\r\n" + text.replace(",", ";")),
    "a space after the comma": ("utf-8", lambda text: text.replace(",", ", ")),
    "UTF-16": ("utf-16", lambda text: text.replace(",", "\t")),
    "UTF-8 with a mark": ("utf-8-sig", lambda text: text),
    "empty rows": ("utf-8", lambda text: text + ",,,\n,,,\n\n,,,\n"),
}


@pytest.mark.parametrize("export", EXPORTS)
def test_what_spreadsheets_write(tmp_path: Path, rows: list[dict], export: str) -> None:
    encoding, change = EXPORTS[export]
    rows[0]["safe_text"] = "café"
    text = "\n".join([HEADER, *(",".join(row[name] for name in NAMES) for row in rows)]) + "\n"
    (tmp_path / "d.csv").write_text(change(text), encoding=encoding)
    data = open_quadruplets(tmp_path / "d.csv")
    assert data.summary.read == len(data) == 4
    assert data.records[0].safe_text == "café" and data.records[3].unsafe_text == "a red circle number 3 on fire"


def test_a_quoted_cell_after_a_comma_and_a_space(tmp_path: Path) -> None:
    (tmp_path / "d.csv").write_text(HEADER.replace(",", ", ") + '\na.png, b.png, "c, d", "e ""f"""\n')
    assert lines_of(tmp_path / "d.csv") == [(2, ["a.png", "b.png", "c, d", 'e "f"'])]


def test_a_column_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    (tmp_path / "d.csv").write_text(f"{HEADER},safe_text\na,b,c,d,e\n")
    with pytest.raises(DataError, match=r"d.csv has two columns 'safe_text': rename one"):
        open_quadruplets(tmp_path / "d.csv")


def test_utf_16_without_a_mark_is_named(tmp_path: Path) -> None:
    (tmp_path / "d.csv").write_bytes(HEADER.encode("utf-16-le"))
    with pytest.raises(DataError, match=r"d.csv holds zero bytes.*save it as UTF-8"):
        open_quadruplets(tmp_path / "d.csv")


def test_utf_16_that_ends_in_half_a_character_is_named(tmp_path: Path) -> None:
    (tmp_path / "d.csv").write_bytes(f"{HEADER}\na,b,c,d\n".encode("utf-16")[:-1])
    with pytest.raises(DataError, match=r"d.csv: UTF-16, cut off or damaged \(truncated data\): save it again"):
        open_quadruplets(tmp_path / "d.csv")
