"""The tiny run that tests train."""

import warnings
from pathlib import Path

import torch

import saferclip_fast as sf
from saferclip_fast.config import Config, load_config
from saferclip_fast.train import train


def tiny_words(run_dir: Path, weights: Path | str, cache: Path) -> list[str]:
    """Options of 20 steps in 3 epochs with dropout, curriculum and validation."""
    return f"""
        run_dir={run_dir} device=cpu threads=1 model.name=ViT-tiny-8-32 model.pretrained={weights}
        data.train=scenes:n=96,size=32 data.val_fraction=0.1 data.num_workers=0 data.cache_dir={cache}
        lora.rank=4 lora.dropout=0.1 optimizer.lr=1e-3 train.epochs=3 train.batch_size=8 train.precision=fp32
        checkpoint.every_steps=2 log.every_steps=3 log.tensorboard=false log.progress=false
    """.split()


def tiny(run_dir: Path, weights: Path | str, cache: Path, *overrides: str) -> Config:
    return load_config(None, [*tiny_words(run_dir, weights, cache), *overrides])


def tuned_run(folder: Path) -> Path:
    """A finished run whose weights moved far, from random ones that are in a file."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(7)
        weights = sf.load_clip("ViT-tiny-8-32").export(folder / "weights")
    train(tiny(folder / "run", weights, folder / "cache", "optimizer.lr=1e-2"))
    return folder / "run"
