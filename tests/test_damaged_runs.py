"""Every file that a run leaves, empty, cut, gone or of another run: one line and exit code 2, or the same result."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from saferclip_fast.evaluate.__main__ import main as evaluate
from saferclip_fast.export.__main__ import main as export
from saferclip_fast.report.__main__ import main as report
from saferclip_fast.train.__main__ import main as train
from tests.support.tiny import tiny_words

RUN_FILES = (
    "config.yaml",
    "best.safetensors",
    "newest checkpoint",
    "final/open_clip_model.safetensors",
    "final/open_clip_config.json",
    "final/frozen.json",
    "evaluation.json",
    "embeddings-tuned.safetensors",
    "log.jsonl",
)
COMMANDS = {
    "evaluate": lambda run, out: evaluate([str(run), "--out", str(out), "--samples", "20", "--quiet", "--device=cpu"]),
    "export": lambda run, out: export([str(run), "--format", "open_clip", "--out", str(out)]),
    "peft": lambda run, out: export([str(run), "--format", "peft", "--out", str(out)]),
    "report": lambda run, out: report([str(run), "--out", str(out)]),
    "resume": lambda run, out: train(["--config", str(run / "config.yaml"), f"run_dir={run}", "resume=auto"]),
}
# What a command does not read, or finds elsewhere; the rest is refused.
UNHARMED = {
    "config.yaml": {"report"},
    "best.safetensors": {"evaluate", "export", "peft", "report"},  # peft: a checkpoint has the same adapters
    "newest checkpoint": {"evaluate", "export", "peft", "report", "resume"},
    "final/open_clip_model.safetensors": {"report", "resume"},
    "final/open_clip_config.json": {"report", "resume"},
    "final/frozen.json": {"report", "resume"},
    "evaluation.json": {"evaluate", "resume"},
    "embeddings-tuned.safetensors": {"evaluate", "export", "peft", "resume"},
    "log.jsonl": {"evaluate", "export", "peft", "report", "resume"},
}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="module")
def finished(weights, tmp_path_factory) -> Path:
    """A run of a few steps whose last step was its best, evaluated."""
    folder = tmp_path_factory.mktemp("finished")
    words = ["train.epochs=1", "train.deterministic=false", "lora.dropout=0"]
    assert train([*tiny_words(folder / "run", weights, folder / "cache"), *words]) == 0
    assert evaluate([str(folder / "run"), "--samples", "20", "--quiet", "--device=cpu"]) == 0
    return folder / "run"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("damage", ["empty", "cut"])
@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("name", RUN_FILES)
def test_a_damaged_file_is_one_line_or_does_no_harm(finished, tmp_path, capsys, name, command, damage):
    run = shutil.copytree(finished, tmp_path / "run")
    file = max((run / "checkpoints").iterdir()) if name == "newest checkpoint" else run / name
    content = file.read_bytes()
    file.write_bytes(content[: len(content) * 2 // 3] if damage == "cut" else b"")
    capsys.readouterr()
    code = COMMANDS[command](run, tmp_path / "out")
    said = capsys.readouterr().err
    errors = [line for line in said.splitlines() if "error: " in line]
    assert "Traceback" not in said
    if command in UNHARMED[name]:
        assert code == 0 and not errors, said
    else:
        assert code == 2 and len(errors) == 1 and file.name.split(".")[0] in errors[0], said


@pytest.mark.parametrize("command", ["evaluate", "export", "peft"])
def test_the_config_of_another_run_is_refused(finished, tmp_path, capsys, command):
    run = shutil.copytree(finished, tmp_path / "run")
    text = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(text.replace("rank: 4", "rank: 8").replace("lr: 0.001", "lr: 0.1"))
    assert COMMANDS[command](run, tmp_path / "out") == 2
    said = capsys.readouterr().err
    assert "is not what this run was trained with: lora.rank=8 (was 4), optimizer.lr=0.1 (was 0.001)" in said


def test_what_may_change_in_a_runs_config_may(finished, tmp_path):
    run = shutil.copytree(finished, tmp_path / "run")
    text = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(text.replace("device: cpu", "device: auto").replace("keep: 2", "keep: 5").rstrip())
    assert COMMANDS["export"](run, tmp_path / "out") == 0


def test_cached_neighbors_that_are_damaged_are_found_again(finished, tmp_path):
    cache = shutil.copytree(finished.parent / "cache", tmp_path / "cache")
    [file] = cache.glob("neighbors-*.safetensors")
    good = file.read_bytes()
    for content in (b"", good[:-5]):
        file.write_bytes(content)
        words = [f"run_dir={tmp_path / str(len(content))}", f"data.cache_dir={cache}", "train.epochs=1"]
        assert train(["--config", str(finished / "config.yaml"), *words]) == 0
        assert file.read_bytes() == good


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["data.train=none.csv"], "no such file or folder: none.csv"),
        (["data.train=pairs.txt"], "no such file or folder: pairs.txt"),
        (["data.val=none.tar"], "cannot read none.tar: No such file"),
        (["data.train=scenes:n=9,sizes=32"], "has no option sizes"),
        (["data.train=photos:path=none.tar"], "no such file: none.tar"),
        (["data.train=scenes:n=9,n=10"], "n is given twice"),
        (["data.cache_dir=/dev/null/cache"], "cannot write to /dev/null/cache (Not a directory): data.cache_dir names"),
        (["run_dir=/dev/null/run"], "cannot write to /dev/null/run (Not a directory)"),
    ],
)
def test_what_can_be_known_before_the_model_is_loaded_is_said_before(weights, tmp_path, capsys, words, message):
    given = tiny_words(tmp_path / "run", weights, tmp_path / "cache")
    assert train([*given, "model.name=no-such-model", *words]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_lines_that_the_log_has_lost_do_not_become_zero_bytes(finished, tmp_path):
    run = shutil.copytree(finished, tmp_path / "run")
    (run / "log.jsonl").write_bytes((run / "log.jsonl").read_bytes()[:100])
    with pytest.warns(UserWarning, match="log.jsonl has lost lines since the checkpoint"):
        assert COMMANDS["resume"](run, None) == 0
    assert b"\0" not in (run / "log.jsonl").read_bytes()
    assert all(json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()[1:])
