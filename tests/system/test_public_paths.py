"""Import paths and commands that users rely on, and that both are light."""

import importlib
import subprocess
import sys
import time
from pathlib import Path

import pytest

import saferclip_fast
from saferclip_fast.__main__ import COMMANDS as MAINS

PUBLIC = {
    "saferclip_fast": saferclip_fast.__all__,
    "saferclip_fast.config": ["Config", "ConfigError", "load_config", "option_table"],
    "saferclip_fast.data": ["DataError", "QuadrupletDataset", "collate", "open_quadruplets", "scenes", "write_shards"],
    "saferclip_fast.data.labeled": ["open_labeled"],
    "saferclip_fast.embeddings": ["bank_from", "embed_images", "embed_quadruplets", "embed_texts", "load_embeddings"],
    "saferclip_fast.describe": ["Described", "WordJudge", "read_words"],
    "saferclip_fast.evaluate": [
        "CaptionBank",
        "Settings",
        "Task",
        "dial_curve",
        "evaluate",
        "measure",
        "published_table",
    ],
    "saferclip_fast.export": ["FORMATS", "ExportError", "Source", "Unsupported", "export", "load_source"],
    "saferclip_fast.gate": ["GateError", "GatedModel", "gate_curve", "gate_model", "load_gate", "measure_gate"],
    "saferclip_fast.generate": ["ClipJudge", "Generated", "Judge", "Prompt", "open_judges", "read_prompts"],
    "saferclip_fast.guard": ["Guard", "GuardError", "fit_guard", "load_guard"],
    "saferclip_fast.label_images": ["label_table", "open_classifier"],
    "saferclip_fast.models": ["ClipModel", "load_clip"],
    "saferclip_fast.objectives": ["Objective", "QuadrupletEmbeddings", "SafeClip", "SaferClip", "ShieldClip"],
    "saferclip_fast.patch": ["Patched", "Spectrum", "patch_model"],
    "saferclip_fast.report": ["load_runs", "render", "write"],
    "saferclip_fast.train": ["TrainResult", "Trainer", "train"],
}
SLOWER = 4  # than an idle machine, at most, while other tests run beside
COMMANDS = (
    *("demo", "describe", "doctor", "evaluate", "export", "gate", "generate", "guard", "label_images", "report"),
    *("patch", "restore", "train", "tune"),
)

HELP = """
import runpy, sys
sys.argv = ["command", "--help"]
try:
    runpy.run_module("saferclip_fast.{command}", run_name="__main__", alter_sys=True)
except SystemExit as stop:
    assert not stop.code
assert "torch" not in sys.modules, "--help waits for torch"
"""


@pytest.mark.parametrize("module", PUBLIC)
def test_public_names_are_where_they_were(module):
    imported = importlib.import_module(module)
    assert [name for name in PUBLIC[module] if not hasattr(imported, name)] == []


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_every_command_does_not_wait_for_torch(command):
    done = subprocess.run(
        [sys.executable, "-c", HELP.format(command=command)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert f"python -m saferclip_fast.{command}" in done.stdout or command == "demo"


COMMAND_LINE = [sys.executable, "-m", "saferclip_fast"]


@pytest.mark.parametrize("words", [["--help"], ["--version"], *([name, "--help"] for name in MAINS)])
def test_the_one_command_answers_at_once(words):
    start = time.perf_counter()
    done = subprocess.run([*COMMAND_LINE, *words], capture_output=True, text=True, check=True)
    assert time.perf_counter() - start < 1.5 * SLOWER
    assert all(name in done.stdout for name in MAINS) or words != ["--help"]
    assert f"usage: saferclip {words[0]}" in done.stdout or words[0].startswith("-")


def test_the_one_command_alone_prints_its_help():
    done = subprocess.run(COMMAND_LINE, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("usage: saferclip") and all(name in done.stdout for name in MAINS)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("trains", "no command 'trains', did you mean 'train'?"),
        ("train data.train=no/such.csv", "no such file or folder: no/such.csv"),
        ("train", "data.train is empty: name the training quadruplets, e.g. data.train=visu.json"),
        ("train data.train=scenes:n=9 model.pretrained=no/w.pt", "weights file no/w.pt not found"),
        ("train data.train=scenes:n=9 model.name=local-dir:no model.pretrained=", "there is no folder no"),
        ("train objective.k=0", "objective.k=0: must be from 1 to 256"),
        ("evaluate no/run", "there is no folder no/run, and unknown model 'no/run'"),
        ("evaluate . --data no.csv", "no such file or folder: no.csv"),
        ("evaluate . --images food=no/food", "cannot read no/food: No such file or directory"),
        ("export no/run --format all --out no/out", "no/run not found"),
        ("restore no/run . --out no/out", "there is no folder no/run, and unknown model 'no/run'"),
        ("restore . no/later --out no/out", "there is no folder no/later, and unknown model 'no/later'"),
        (
            "restore . . --out no/out --add -1",
            "--add is how much of the safe change is added, a finite number",
        ),
        ("patch no/run --pairs p.csv --out no/out", "there is no folder no/run: give the folder of the run"),
        ("patch . --pairs p.csv --out no/out", ". is no run: give the folder of the run that made the model safe"),
        ("patch . --pairs p.csv --out no/out --steps 0", "--steps is how many steps are taken, 1 or more, got 0"),
        ("generate no/pipe --run . --prompts p.txt --out no/out", "no/pipe is no folder of a diffusers pipeline"),
        ("generate hf-hub:a/b --run no/run --prompts p.txt --out no/out", "no/run not found"),
        ("generate hf-hub:a/b --run . --prompts p.txt --out no/out", "cannot read p.txt: there is no such file"),
        ("generate hf-hub:a/b --run . --prompts p.doc --out no/out", "cannot tell the format of p.doc"),
        ("describe no/llava --run . --images . --out no/out", "no/llava is no folder of a transformers model"),
        ("describe hf-hub:a/b --run no/run --images . --out no/out", "no/run not found"),
        ("describe hf-hub:a/b --run . --images no/images --out no/out", "no such folder of images: no/images"),
        ("describe hf-hub:a/b --run . --images . --out no/out", "--judge words needs the words to look for"),
        ("report no/run", "no/run is no folder"),
        ("guard no/run", "no/run is no run (it has no config.yaml)"),
        ("gate no/run --out no/out", "no/run is no run (config.yaml) and no gate (gate.json)"),
        ("label no.csv --out new.csv", "cannot read no.csv: there is no such file"),
    ],
)
def test_a_wrong_word_is_refused_in_one_line_before_torch_is_imported(words, message, tmp_path):
    start = time.perf_counter()
    code = "import sys; sys.modules['torch'] = None; from saferclip_fast.__main__ import main; sys.exit(main())"
    done = subprocess.run([sys.executable, "-c", code, *words.split()], capture_output=True, text=True, cwd=tmp_path)
    assert time.perf_counter() - start < 2 * SLOWER
    assert done.returncode == 2 and done.stderr.startswith(f"error: {message}") and done.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_names_and_places_that_are_known_without_torch_are_those_that_are_read():
    from saferclip_fast.data import open as opener
    from saferclip_fast.data import places
    from saferclip_fast.data.readers import tables

    assert set(places.SCHEMES) == set(opener.GENERATED) and set(places.TABLES) == {*tables.READERS, ".parquet"}


def test_the_console_script_is_the_same():
    project = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    assert '[project.scripts]\nsaferclip = "saferclip_fast.__main__:main"' in project
    folders = {folder for folder, _ in MAINS.values()}
    there = {path.parent.name for path in Path(saferclip_fast.__file__).parent.glob("*/__main__.py")}
    assert folders == there == {*COMMANDS}


def test_import_does_not_wait_for_torch():
    code = "import sys, saferclip_fast; assert 'torch' not in sys.modules; saferclip_fast.nearest_safe"
    subprocess.run([sys.executable, "-c", code], check=True)
