"""Memory of a training run over time: constant, and a leak would be seen."""

import json
import random
import subprocess
import sys

import pytest

from tests.system import soak


@pytest.mark.parametrize("leak_mib", [0.0, 30.0])
def test_a_climb_is_told_from_noise(leak_mib):
    """Readings wander by 3 MiB and jump by 40 at checkpoints; a leak of 30 MiB over them is measured within 3."""
    chance = random.Random(0)
    readings = [400 + chance.gauss(0, 3) + (40 if i % 25 == 0 else 0) + leak_mib * i / 999 for i in range(1000)]
    assert soak.climb(readings) == pytest.approx(leak_mib, abs=3)


def test_training_steps_keep_their_memory(tmp_path):
    """In a process of its own: what other tests left behind is no part of it."""
    command = [sys.executable, "-m", "tests.system.soak", "--minutes", "0.35", "--json", str(tmp_path / "soak.json")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads((tmp_path / "soak.json").read_text())["steps"] > 30, "too few steps to say anything"
