"""Import paths and commands that users rely on, and that both are light."""

import importlib
import subprocess
import sys

import pytest

import saferclip_fast

PUBLIC = {
    "saferclip_fast": saferclip_fast.__all__,
    "saferclip_fast.config": ["Config", "ConfigError", "load_config", "option_table"],
    "saferclip_fast.data": ["DataError", "QuadrupletDataset", "collate", "open_quadruplets", "scenes", "write_shards"],
    "saferclip_fast.data.labeled": ["open_labeled"],
    "saferclip_fast.embeddings": ["bank_from", "embed_images", "embed_quadruplets", "embed_texts", "load_embeddings"],
    "saferclip_fast.evaluate": ["CaptionBank", "Settings", "Task", "dial_curve", "evaluate", "measure"],
    "saferclip_fast.export": ["FORMATS", "ExportError", "Source", "Unsupported", "export", "load_source"],
    "saferclip_fast.label_images": ["label_table", "open_classifier"],
    "saferclip_fast.models": ["ClipModel", "load_clip"],
    "saferclip_fast.objectives": ["Objective", "QuadrupletEmbeddings", "SafeClip", "SaferClip", "ShieldClip"],
    "saferclip_fast.report": ["load_runs", "render", "write"],
    "saferclip_fast.train": ["TrainResult", "Trainer", "train"],
}
COMMANDS = ("demo", "evaluate", "export", "label_images", "report", "train", "tune")

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


def test_import_does_not_wait_for_torch():
    code = "import sys, saferclip_fast; assert 'torch' not in sys.modules; saferclip_fast.nearest_safe"
    subprocess.run([sys.executable, "-c", code], check=True)
