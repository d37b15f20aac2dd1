"""A tiny model and samples in memory, and one run of them that several tests look at."""

import warnings

import pytest
import torch

import saferclip_fast as sf
from saferclip_fast import data

IMAGES = ("safe_image", "unsafe_image")


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Which is fastest at this size."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def clip():
    torch.manual_seed(7)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # random weights
        return sf.load_clip("ViT-tiny-8-32")


@pytest.fixture(scope="session")
def rows() -> list[dict]:
    """Samples as a caller has them: PIL images and texts."""
    return [
        {name: getattr(record, name).load() for name in IMAGES}
        | {"safe_text": record.safe_text, "unsafe_text": record.unsafe_text}
        for record in data.open_quadruplets("scenes:n=48,size=32").records
    ]


@pytest.fixture(scope="session")
def options(tmp_path_factory) -> dict:
    """Four steps in two epochs."""
    return {
        "device": "cpu",
        "lora.rank": 2,
        "objective": {"k": 4, "guard_k": 4},
        "optimizer.lr": 1e-3,
        "train": {"epochs": 2, "batch_size": 16, "precision": "fp32"},
        "curriculum.enabled": False,
        "data": {"val_fraction": 0.2, "num_workers": 0, "cache_dir": str(tmp_path_factory.mktemp("cache"))},
        "log": {"every_steps": 2, "tensorboard": False, "progress": False},
    }


@pytest.fixture(scope="session")
def told() -> list:
    """What the callbacks of `tuned` were told."""
    return []


@pytest.fixture(scope="session")
def tuned(clip, rows, options, told, tmp_path_factory) -> sf.FineTuned:
    run_dir = tmp_path_factory.mktemp("runs") / "run"
    calls = dict.fromkeys(("on_step", "on_validation", "on_end"), told.append)
    return sf.fine_tune(clip, rows, options=options, run_dir=run_dir, **calls)
