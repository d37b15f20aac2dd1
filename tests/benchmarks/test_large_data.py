"""The benchmark of large data sets runs every stage, and its table says how each grows."""

import json
from pathlib import Path

from benchmarks.memory import large_data

ROOT = Path(__file__).parents[2]


def test_every_stage_is_measured_and_nothing_is_left(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["large_data", "--rows", "40", "80", "--out", str(tmp_path)])
    large_data.main()
    found = json.loads((tmp_path / "large_data.json").read_text())["rows"]
    assert [row["stage"] for row in found] == [stage.__name__ for stage in large_data.STAGES] * 2
    assert all(row["seconds"] > 0 and row["MiB"] >= 0 for row in found)
    disk = {row["stage"]: row["disk MiB"] for row in found if row["rows"] == 80}
    assert disk["cache"] > 2 * disk["bank"] * 0.9 > 0 and disk["resume"] == 0
    assert {file.name for file in tmp_path.iterdir()} == {"large_data.json", "large_data.png"}
    assert capsys.readouterr().out.count("| 0.") >= len(large_data.STAGES)


def test_growth_is_the_exponent_of_rows():
    rows = [{"stage": "read", "rows": n, "seconds": n**1.5 / 1e6, "MiB": 1.0} for n in (1_000, 100_000, 10_000)]
    assert abs(large_data.growth(rows, "read", "seconds") - 1.5) < 1e-5


def test_the_table_of_the_scale_page_is_the_committed_result():
    found = json.loads((ROOT / "benchmarks" / "results" / "large_data" / "large_data.json").read_text())
    assert large_data.table(found["rows"]) in (ROOT / "docs" / "scale.md").read_text(encoding="utf-8")
