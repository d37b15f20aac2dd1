"""Where there is no GPU the Triton kernels are interpreted, which has to be settled before anything imports them."""

import os
import warnings
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(scope="session")
def weights(tmp_path_factory) -> Path:
    """Weights of a tiny model, as open_clip loads them."""
    torch.manual_seed(7)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from saferclip_fast.models import load_clip  # slow to import

        clip = load_clip("ViT-tiny-8-32")
    return clip.export(tmp_path_factory.mktemp("weights"))
