"""The work of the evaluate command, once its words are read."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..config import Config, ConfigError, load_config
from ..data.labeled import open_labeled, readable_images
from ..data.open import check_source
from ..models import ClipModel
from ..sources import frozen_of, is_run, open_model
from ..storage.claim import claim
from ..storage.files import check_writable
from ..train.device import set_up_torch
from .held_out import named, open_held_out, read_config
from .measurement import Known, dial_curve, evaluate
from .pictures import draw_dial
from .tables import label_tables, table
from .task import Settings, Task
from .zero_shot import read_templates


def run(given: argparse.Namespace) -> None:
    """Evaluates what the command line asks for; prints the table and writes the files."""
    config = read_config(given.model, given.overrides)
    if given.data:
        config.data.val = given.data
    config.log.progress = not given.quiet
    out = given.out or (Path(given.model) if is_run(given.model) else Path("runs/evaluation"))
    if given.out is None and (out / "evaluation.json").is_file():
        raise ConfigError(
            f"{out} holds an evaluation already: pass --out DIR for another, or --out {out} to replace it"
        )
    with claim(out):
        _run(given, config, out)


def _run(given: argparse.Namespace, config: Config, out: Path) -> None:
    device = set_up_torch(load_config(None, [f"device={given.device}", f"seed={given.seed}"]))
    if source := config.data.val or config.data.train:
        check_source(source, config.data.root or None)
    check_writable(config.data.cache_dir, "data.cache_dir")
    tuned = open_model(given.model, device)
    frozen = None
    if given.frozen:
        frozen = open_model(given.frozen, device)
    elif is_run(given.model):
        frozen = frozen_of(given.model, device)
    if given.dial and frozen is None:
        raise ConfigError("--dial goes from a frozen model to MODEL: name it with --frozen MODEL0")
    task = read_task(given, config, tuned)
    settings = Settings(
        cache_dir=config.data.cache_dir,
        batch_size=given.batch_size,
        num_workers=config.data.num_workers,
        precision=given.precision,
        resamples=given.samples,
        seed=given.seed,
        progress=not given.quiet,
    )
    known: Known = {}
    evaluation = evaluate(tuned, frozen, task, settings, out, known)
    print(f"\n{evaluation['rows']} held-out quadruplets; 95 % intervals\n")
    print(table(evaluation, given.all))
    if len(evaluation["safe_unsafe_table"]) > 1:
        print(f"\nthe unsafe side by its labels\n\n{label_tables(evaluation)}")
    print(f"\nevaluation: {out / 'evaluation.json'}")
    if given.dial:
        assert frozen is not None
        draw_dial(out / "dial", dial_curve(tuned, frozen, task, settings, out, known=known))
        print(f"safety dial: {out / 'dial.json'}, {out / 'dial.png'}, {out / 'dial.svg'}")
    print(f"as a page: python -m saferclip_fast.report {out}")


def read_task(given: argparse.Namespace, config: Config, clip: ClipModel) -> Task:
    """The data to measure on; all of it is opened before anything is embedded."""
    templates = read_templates(given.templates) if given.templates else None
    labeled = named(given.images, "--images", open_labeled)
    images = named(
        given.caption_images,
        "--caption-images",
        lambda folder, name: readable_images(folder, config.data.on_error, not given.quiet),
    )
    held_out = open_held_out(config, clip)
    if held_out is None and images:
        raise ConfigError("--caption-images are matched with the captions of quadruplets: name some with --data SOURCE")
    if held_out is None and given.dial:
        raise ConfigError("--dial is drawn over retrieval: name held-out quadruplets with --data SOURCE")
    if held_out is None and not labeled:
        raise ConfigError("nothing to measure on: name quadruplets (--data SOURCE) or zero-shot sets (--images SOURCE)")
    return Task(
        quadruplets=held_out and held_out.quadruplets,
        zero_shot=list(labeled.values()),
        templates=templates,
        images=images,
        captions=held_out and held_out.captions,
    )
