"""What can be known of a generation by its words: checked before torch is imported."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..data.places import table_suffix

TABLES = (".csv", ".tsv", ".jsonl", ".ndjson")
HUB = "hf-hub:"
DTYPES = ("auto", "fp32", "fp16", "bf16")
SAVED = "model_index.json"  # what a pipeline's folder holds


def check_pipeline(pipeline: str) -> None:
    """Raises FileNotFoundError for a folder that is not there or holds no pipeline."""
    if not pipeline.startswith(HUB) and not (Path(pipeline) / SAVED).is_file():
        raise FileNotFoundError(
            f"{pipeline} is no folder of a diffusers pipeline (it has no {SAVED}): give what save_pretrained wrote, "
            f"or {HUB}OWNER/NAME for one of the hub"
        )


def check_prompts(path: Path) -> None:
    """Raises FileNotFoundError or ValueError for a file of prompts that is not there, or of another format."""
    if path.suffix.lower() != ".txt" and table_suffix(path) not in TABLES:
        raise ValueError(f"cannot tell the format of {path}: prompts are read from .txt, {', '.join(TABLES)}")
    check_file(path)


def check_judges(names: Sequence[str], model: str | None, categories: str | None) -> None:
    """Raises ValueError or FileNotFoundError for judges that cannot be opened as they are named."""
    check_names(names, ("nudenet", "clip"), "images")
    if "clip" in names and not model:
        raise ValueError("--judge clip needs a CLIP to judge with: --judge-model NAME,PRETRAINED, or a folder")
    if "clip" not in names and (model or categories):
        raise ValueError("--judge-model and --judge-categories are of --judge clip, which is not asked for")
    if categories:
        check_file(Path(categories))


def check_names(names: Sequence[str], known: Sequence[str], what: str) -> None:
    """Raises ValueError for no name of a judge of `what`, one twice, or one that is neither `known` nor the user's."""
    if not names:
        raise ValueError(f"nothing judges the {what}: name one or several with --judge, e.g. --judge {known[0]}")
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"--judge {twice[0]} is named twice")
    for name in names:
        if name not in known and not all(name.partition(":")):
            raise ValueError(f"--judge {name!r}: write {', '.join(known)}, or MODULE:FACTORY for one of your own")


def check_file(path: Path) -> None:
    """Raises FileNotFoundError where there is no file at `path`."""
    if not path.is_file():
        raise FileNotFoundError(f"cannot read {path}: there is no such file")


def check_run(threshold: float, dtype: str, **counts: int | None) -> None:
    """Raises ValueError for an option that means nothing; `counts` are whole numbers from 1 on, or None."""
    for name, value in counts.items():
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1, not {value}")
    if not 0 < threshold <= 1:
        raise ValueError(f"--threshold is a probability, above 0 to 1, not {threshold}")
    if dtype not in DTYPES:
        raise ValueError(f"--dtype {dtype!r} is none of {', '.join(DTYPES)}")
