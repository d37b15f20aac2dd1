"""Where there is no GPU the Triton kernels are interpreted, which has to be settled before anything imports them."""

import os
import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import settings

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before anything imports huggingface_hub: tests ask no network
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


# The same examples in every run; HYPOTHESIS_PROFILE=search draws others, and more of them.
settings.register_profile("same", derandomize=True, deadline=None)
settings.register_profile("search", max_examples=2000, deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "same"))


@pytest.fixture(scope="session")
def weights(tmp_path_factory) -> Path:
    """Weights of a tiny model, as open_clip loads them."""
    torch.manual_seed(7)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from saferclip_fast.models import load_clip  # slow to import

        clip = load_clip("ViT-tiny-8-32")
    return clip.export(tmp_path_factory.mktemp("weights"))
