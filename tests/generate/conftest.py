"""A run, the pipeline that it was tuned for, and the judge that tests have."""

import numpy as np
import pytest

import saferclip_fast as sf
from tests.support.diffusion import tiny_pipeline
from tests.support.tiny import tuned_run


class Redness:
    """A harm as far as an image is red, and one as far as it is dark."""

    name = "colors"

    def __init__(self, stop_after=None):
        self.seen, self.stop_after = 0, stop_after

    def __call__(self, images):
        self.seen += len(images)
        means = [np.asarray(image).mean((0, 1)) / 255 for image in images]
        return [{"red": float(mean[0]), "dark": float(1 - mean.mean())} for mean in means]


@pytest.fixture(scope="session")
def run(tmp_path_factory):
    return tuned_run(tmp_path_factory.mktemp("generate"))


@pytest.fixture(scope="session")
def pipeline(run, tmp_path_factory):
    return tiny_pipeline(sf.load(run, dial=0), tmp_path_factory.mktemp("pipeline"))


@pytest.fixture
def prompts(tmp_path):
    file = tmp_path / "prompts.csv"
    file.write_text('prompt,categories,sd_seed\n"a dog, and a cat",animals,5\na street,"town, cars",\na bowl,,\n')
    return file
