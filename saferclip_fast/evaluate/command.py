"""The work of the evaluate command, once its words are read."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ..config import ConfigError
from ..results import NO_UNSAFE_IMAGES
from ..sources import is_run
from .beside_published import published_table
from .call import evaluate_model
from .tables import label_tables, table


def run(given: argparse.Namespace) -> None:
    """Evaluates what the command line asks for; prints the table and writes the files."""
    out = given.out or (Path(given.model) if is_run(given.model) else Path("runs/evaluation"))
    file = f"table-{given.table}.json" if given.table else "evaluation.json"
    if given.out is None and (out / file).is_file():
        kind = "such a table" if given.table else "an evaluation"
        raise ConfigError(f"{out} holds {kind} already: pass --out DIR for another, or --out {out} to replace it")
    measuring: dict[str, Any] = {
        "frozen": given.frozen,
        "out": out,
        "options": given.overrides,
        "device": given.device,
        "precision": given.precision,
        "batch_size": given.batch_size,
        "samples": given.samples,
        "seed": given.seed,
        "progress": not given.quiet,
    }
    if given.table:
        print(f"\n{published_table(given.model, given.table, given.table_data, **measuring)}")
        print(f"\ntable: {out / file}")
        return
    found = evaluate_model(
        given.model,
        given.data,
        images=given.images,
        templates=given.templates,
        caption_images=given.caption_images,
        dial=given.dial,
        max_loss=given.max_loss,
        confidence=given.confidence,
        **measuring,
    )
    print(f"\n{found.rows} held-out quadruplets; 95 % intervals\n")
    print(table(found.json, given.all))
    if found.json.get("text_only"):
        print(f"\n{NO_UNSAFE_IMAGES}")
    if len(found.json["safe_unsafe_table"]) > 1:
        print(f"\nthe unsafe side by its labels\n\n{label_tables(found.json)}")
    print(f"\nevaluation: {out / 'evaluation.json'}")
    if given.dial:
        if found.promise:
            print(f"\n{found.promise}")
        print(f"safety dial: {out / 'dial.json'}, {out / 'dial.png'}, {out / 'dial.svg'}")
    print(f"as a page: python -m saferclip_fast.report {out}")
