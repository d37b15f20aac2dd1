"""The README's table and figures are the committed JSON; the benchmarks compare like with like, and resume."""

import copy
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn.functional import normalize

import saferclip_fast as sf
from benchmarks import harness, render, run
from benchmarks.differs import difference
from benchmarks.quality import tables
from benchmarks.speed import (
    bank,
    info_nce,
    nearest_safe,
    objective,
    preservation_loss,
    retarget_loss,
    search_rivals,
    train_step,
)
from saferclip_fast.objectives import DEFAULT_WEIGHTS
from tests.train.ranks.launch import torchrun

ROOT = Path(__file__).parents[2]

RESULTS = render.load(ROOT / "benchmarks" / "results")


@pytest.mark.parametrize("page", render.PAGES)
def test_tables_of_the_pages_are_the_committed_results(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    assert render.filled(page, text, RESULTS) == text, "run python -m benchmarks.render"


@pytest.mark.parametrize("page", render.PAGES)
def test_every_figure_of_the_tables_comes_from_the_results(page):
    """Another measurement gives another table."""
    text = (ROOT / page).read_text(encoding="utf-8")
    changed = copy.deepcopy(RESULTS)
    for line in render.lines(changed):
        line.row[f"{line.ours}_ms"] *= 1.5
        line.row["torch/" + line.ours] /= 1.5
    old, new = (render.filled(page, text, results).splitlines() for results in (RESULTS, changed))
    differ = [a for a, b in zip(old, new, strict=True) if a != b]
    assert len(differ) >= len(render.lines(changed)) > 4


def test_figures_show_the_committed_results():
    for name in ("speedups", "scaling"):
        for theme in render.THEMES:
            drawn = (ROOT / "docs" / "pictures" / f"{name}-{theme}.svg").read_text(encoding="utf-8")
            assert f"<dc:description>{render.digest(RESULTS)}<" in drawn, "run python -m benchmarks.render"


def test_ablation_tables_are_the_committed_results():
    rows = json.loads((ROOT / "benchmarks" / "results" / "ablation" / "ablation.json").read_text())["rows"]
    method = (ROOT / "docs" / "method.md").read_text(encoding="utf-8")
    for data in ("scenes", "photos"):
        assert tables.table(row for row in rows if row["data"] == data) in method


def test_tables_mark_what_differs_and_the_fastest_library_is_shown():
    row = {"data": "clip_like", "Q": 1024, "N": 9, "d": 4, "k": 1, "threads": 2, "best_torch": "eager"}
    row |= {"ours_ms": 1.0, "ours_packed_ms": 1.0, "ours_packed_avx2_ms": 2.0, "eager_ms": 6.0, "best_torch_ms": 6.0}
    row |= {"faiss_ms": 5.0, "faiss_panorama_ms": 4.0, "numkong_ms": 3.0, "revision": "abc", "date": "2026-01-01"}
    facts = {"cpu": "a CPU", "cores": 2, "isa": "avx512vnni", "torch": "3", "faiss-cpu": "2", "numkong": "1"}
    few, plain = {**row, "Q": 1}, {key: value for key, value in row.items() if not key.startswith(("faiss", "numkong"))}
    both = {"processes": 2, "B": 64, "bank_rows": 2000, "threads": 1, "ours_ms": 2.0, "best_torch_ms": 3.0}
    results = {
        "nearest_safe": {"machine": facts, "rows": [row, few, plain]},
        "two_processes": {"machine": facts, "rows": [{**both, "best_torch": "eager", "eager_ms": 3.0}]},
    }
    page = render.everything(results)
    assert "avx512vnni, torch 3, faiss-cpu 2, numkong 1" in page
    assert "| ours packed avx2 | eager † | faiss † | faiss panorama ‡ | numkong § |" in page
    assert (
        "\n\n† scores summed in float32, no rule for ties; ‡ scores" in page and "; § scores summed in double" in page
    )
    *shown, together = render.lines(results)
    assert together.size == "2 processes of one thread, bank of 2,000, B = 64" and together.speedup == 1.5
    assert [line.size.partition(" quer")[0] for line in shown] == ["1,024", "1", "1,024"]
    assert [line.rival_speedup for line in shown] == ["NumKong: 3.00×", "NumKong: 3.00×", ""]
    assert difference("nearest_safe", "chunked_2048") == difference("nearest_safe", "faiss")
    assert difference("nearest_safe", "faiss") != difference("nearest_safe", "faiss_panorama")
    assert difference("nearest_safe", "ours_packed_avx2") is None is difference("objective", "eager")


def test_a_page_without_markers_is_named():
    with pytest.raises(ValueError, match=r"README\.md must hold"):
        render.filled("README.md", "no markers", RESULTS)


def test_committed_results_name_no_host_and_no_path():
    files = sorted((ROOT / "benchmarks" / "results").rglob("*.json"))
    assert len(files) > len(RESULTS), "those of the folders, too"
    for file in files:
        text = file.read_text(encoding="utf-8")
        assert not re.search(r"/(home|work|tmp|root|usr)/", text) and "hostname" not in text, file


@pytest.fixture
def uncompiled(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)  # compiling is not what is tested here


def test_objective_paths_compute_the_same(uncompiled):
    paths = objective.paths(B=24, d=16, k=4, bank_rows=100)
    expected = paths["eager"]()
    for name in ("ours", "compiled"):
        for found, gradient in zip(paths[name](), expected, strict=True):
            torch.testing.assert_close(found, gradient, rtol=1e-4, atol=1e-5 * float(gradient.abs().max()))
    parts = [paths[f"ours_{part}"]() for part in ("redirection", "preservation", "guard")]
    weight = DEFAULT_WEIGHTS["rank_guard"]
    for i, gradient in enumerate(expected[2:], 2):
        both = parts[0][i] + weight * parts[2][i]
        torch.testing.assert_close(both, gradient, rtol=1e-4, atol=1e-5 * float(gradient.abs().max()))
    assert parts[2][2].any() and parts[2][3].any(), "no hinge is open, so that nothing was compared"


@pytest.mark.parametrize("which", ["forward", "both"])
@pytest.mark.parametrize("op", ["retarget k1", "retarget k3", "preservation", "info_nce 1", "info_nce 0.5"])
def test_loss_paths_compute_the_same(uncompiled, op, which):
    if op == "preservation":
        paths = preservation_loss.paths(B=24, d=16, **{"pass": which})
    elif op.startswith("info_nce"):
        paths = info_nce.paths(B=24, d=16, chosen=float(op[9:]))
    else:
        paths = retarget_loss.paths(B=24, d=16, k=int(op[-1]), bank_rows=50, **{"pass": which})
    results = {name: path() for name, path in paths.items() if name not in ("products", "copy")}
    whole = {name: x if isinstance(x, tuple) else (x,) for name, x in results.items()}
    if op.startswith("info_nce") and hasattr(torch.nn, "LinearCrossEntropyOptions"):
        assert "chunked_linear_cross_entropy" in whole and "chunked_linear_cross_entropy".startswith(harness.PYTORCH)
    for name, found in whole.items():
        for a, b in zip(found, whole["eager"], strict=True):
            rounding = 1e-5 * float(b.abs().max())  # entries near zero are sums of others that are not
            torch.testing.assert_close(a, b, rtol=1e-4, atol=rounding, msg=lambda text, name=name: f"{name}: {text}")


def test_search_paths_find_the_same(uncompiled, monkeypatch):
    monkeypatch.setattr(nearest_safe, "CHUNKS", (16, 64))
    rows = nearest_safe.clip_like(200, 32)
    query = torch.randn(7, 32)
    paths = nearest_safe.paths(query, rows, nearest_safe.packed_bank(rows), 5, compiled=True)
    assert {*("ours", "ours_packed", "eager", "eager_bank_first", "compiled", "chunked_16", "chunked_64")} == set(paths)
    nearest = nearest_safe.paths(query, rows, nearest_safe.packed_bank(rows), 1, compiled=False)
    for of_k in (paths, nearest):
        wanted = of_k.pop("ours")()
        for path in of_k.values():
            scores, indices = path()
            assert torch.equal(indices, wanted.indices)
            torch.testing.assert_close(scores, wanted.scores)


@pytest.mark.parametrize("name", ["faiss_flat", "faiss_panorama", "numkong"])
def test_searches_of_other_libraries_find_the_same(name, monkeypatch):
    library = pytest.importorskip(name.split("_")[0])
    if name == "faiss_panorama" and not hasattr(library, "IndexFlatIPPanorama"):
        pytest.skip("this FAISS has no Panorama for inner products")
    monkeypatch.setattr(search_rivals, "PART", 64)  # four parts, the last one smaller
    rows, query = nearest_safe.clip_like(200, 32), torch.randn(7, 32)
    wanted = sf.nearest_safe(query, rows, 5)
    scores, indices = map(torch.as_tensor, getattr(search_rivals, name)(rows)(normalize(query, dim=1), 5))
    assert torch.equal(indices, wanted.indices)
    torch.testing.assert_close(scores.float(), wanted.scores)


def test_faiss_gets_a_kernel_of_this_cpu_where_its_blas_does_not_know_it():
    known, unknown = "openblas 0.3.15 Zen", "openblas 0.3.15 Prescott"
    kernels = [search_rivals.better_kernel(unknown, isas) for isas in (["avx512vnni", "avx2"], ["avx2"], [])]
    assert kernels == ["SkylakeX", "Haswell", None] and search_rivals.better_kernel(known, ["avx2"]) is None


def test_a_forced_instruction_set_is_used_and_finds_the_same(monkeypatch):
    rows = nearest_safe.clip_like(200, 32)
    query, packed = torch.randn(7, 32), nearest_safe.packed_bank(rows)
    wanted = sf.nearest_safe(query, packed, 5)
    others = [name for name in harness.isas() if name != harness.isa()]
    paths = nearest_safe.forced_paths(query, packed, 5)
    assert list(paths) == [f"ours_packed_{name}" for name in others]
    for path in paths.values():
        assert all(map(torch.equal, path(), wanted))
    monkeypatch.setattr(harness, "isas", lambda: ["none"])
    with pytest.raises(RuntimeError, match="SAFERCLIP_FAST_ISA=none is unknown"):
        nearest_safe.forced_paths(query, packed, 5)["ours_packed_none"]()
    assert all(map(torch.equal, sf.nearest_safe(query, packed, 5), wanted)), "forced for that call alone"


def test_two_processes_compute_the_gradient_of_the_whole_batch_and_measure(tmp_path):
    path = tmp_path / "two_processes.json"
    done = torchrun(2, "tests.benchmarks.two_ranks", str(path))
    assert done.returncode == 0, done.stdout
    (row,) = json.loads(path.read_text())["rows"]
    assert row["processes"] == 2 and row["threads"] == 1
    assert row["torch/ours"] == pytest.approx(row["eager_ms"] / row["ours_ms"])


@pytest.mark.filterwarnings("ignore:.*random weights")
def test_training_steps_and_embeddings_run():
    """Small, so that the time says nothing; that both models embed alike is checked inside."""
    for step in train_step.steps("ViT-tiny-8-32", train_step.make_batch(4, 32, 5, 9), 0.0, ladder=False).values():
        step()
    assert set(bank.embed("ViT-tiny-8-32", 4)) == {"ours", "authors", "eager"}


def test_int8_products_are_those_of_the_rows():
    rows = torch.nn.functional.normalize(torch.randn(40, 64), dim=1)
    products = search_rivals.int8_mm(rows)(rows[:32], 1)
    torch.testing.assert_close(products / 127**2, rows[:32] @ rows.T, atol=0.05, rtol=0)


def test_measurements_hold_times_memory_and_ratios():
    big = torch.empty(16, 2**18)
    found = harness.measure({"ours": lambda: 0, "eager": lambda: torch.ones_like(big), "copy": lambda: 0}, 3, 1.0)
    assert found["best_torch"] == "eager"
    assert found["torch/ours"] == found["eager_ms"] / found["ours_ms"] > 1
    said = iter([3.0, 0.5, 1.0, 2.0, 0.2, 0.1, 9.0])
    told = harness.medians({"a": lambda: 0, "b": lambda: 0}, 5, 5.0, clock=lambda _: next(said))
    assert told == ({"a": 1.0, "b": 0.5}, 3), "a spent budget ends the rounds, but not before there is a median"
    assert next(said) == 9.0, "the clock alone says when the budget is spent"
    assert found["rounds"] >= 3
    if found["eager_MiB"] is not None:
        assert 15 < found["eager_MiB"] < 20 and found["ours_MiB"] < 1


def test_what_is_measured_is_not_measured_again(tmp_path):
    path = str(tmp_path / "op.json")
    first = harness.Results("op", path)
    first.add({"B": 1}, {"ours_ms": 1.0})
    again = harness.Results("op", path)
    assert again.has({"B": 1}) and not again.has({"B": 2})
    assert again.rows == first.rows and {"revision", "date", "threads", "seconds"} <= set(again.rows[0])


def test_a_revision_has_a_plus_where_the_code_differs_not_the_results(tmp_path, monkeypatch):
    def git(*words):
        subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=b", *words], cwd=tmp_path, check=True)

    files = [tmp_path / "benchmarks" / name for name in ("results/op.json", "run.py")]
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("1")
    git("init", "--quiet")
    git("add", ".")
    git("commit", "--quiet", "--message", "first")
    monkeypatch.setattr(harness, "ROOT", tmp_path)
    first = harness.revision()
    files[0].write_text("2")
    assert harness.revision() == first
    files[1].write_text("2")
    assert harness.revision() == f"{first}+"


def test_results_of_another_machine_are_put_aside(tmp_path, monkeypatch):
    path = tmp_path / "op.json"
    harness.Results("op", str(path)).add({"B": 1}, {"ours_ms": 1.0})
    monkeypatch.setattr(harness, "machine", lambda: {"cpu": "another", "isa": "avx2"})
    assert not harness.Results("op", str(path)).has({"B": 1})
    assert json.loads((tmp_path / "op.json.old").read_text())["rows"][0]["B"] == 1


def test_the_runner_runs_what_was_asked_for_and_reports_what_failed(tmp_path, monkeypatch, capsys):
    class Process:
        returncode = 0

    seen = []

    def launch(command, env):
        seen.append((command[2], command[3:], env["OMP_NUM_THREADS"], env["PYTHONPATH"]))
        Process.returncode = int(env["OMP_NUM_THREADS"] == "1")
        return Process

    monkeypatch.setattr(run, "CORES", 2)
    monkeypatch.setattr(run.subprocess, "run", launch)
    monkeypatch.setattr(sys, "argv", ["run.py", "--only", "retarget_loss", "--out", str(tmp_path), "--rounds", "1"])
    monkeypatch.setattr(run.render, "load", lambda _: RESULTS)
    assert run.main() == 1
    options = ["--json", str(tmp_path / "retarget_loss.json"), "--rounds", "1"]
    assert [call[:3] for call in seen] == [("benchmarks.speed.retarget_loss", options, n) for n in ("2", "1")]
    assert seen[0][3].startswith(str(ROOT))
    assert "failed: retarget_loss with 1 threads" in capsys.readouterr().err
