"""A run, the LLaVA that it was tuned for, and images."""

import numpy as np
import pytest
from PIL import Image

import saferclip_fast as sf
from tests.support.llava import tiny_llava
from tests.support.tiny import tuned_run


@pytest.fixture(scope="session")
def run(tmp_path_factory):
    return tuned_run(tmp_path_factory.mktemp("describe"))


@pytest.fixture(scope="session")
def llava(run, tmp_path_factory):
    return tiny_llava(sf.load(run, dial=0), tmp_path_factory.mktemp("llava"))


@pytest.fixture(scope="session")
def images(tmp_path_factory):
    """Six, two of them in a folder of their own."""
    folder, noise = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    (folder / "town").mkdir()
    for name in ("a.png", "b.png", "c.png", "d.png", "town/e.png", "town/f.png"):
        Image.fromarray(noise.integers(0, 256, (40, 48, 3), dtype=np.uint8)).save(folder / name)
    return folder
