"""Put a fine-tuned model to use elsewhere: python -m saferclip_fast.export RUN --format huggingface --out DIR"""

from __future__ import annotations

import argparse
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

from ..cli import MISTAKES, mistake, run_command
from ..models.places import check_there
from .names import NAMES

ALL = "all"
EXAMPLES = """
examples:
  A run, for transformers, Stable Diffusion 1.x and LLaVA.
    python -m saferclip_fast.export runs/visu --format huggingface --out exports/visu

  Every format that the model has, a bit less far from the frozen model.
    python -m saferclip_fast.export runs/visu --format all --alpha 0.8 --out exports/visu-0.8

  Hugging Face weights for open_clip.
    python -m saferclip_fast.export clip-vit-large-patch14 --format open_clip --out exports/openai

What each format can hold: docs/export.md.
"""


def main(words: Sequence[str] | None = None, prog: str = "python -m saferclip_fast.export") -> int:
    """Command line; returns the exit code: 0 done, 2 a mistake in what was asked for, 1 a wrong export,
    130 stopped by Ctrl-C."""
    parser = argparse.ArgumentParser(
        prog=prog,
        description="Write a fine-tuned CLIP for open_clip, Hugging Face transformers, peft or ONNX. Each format is\n"
        "read back by its own library and compared with the model before it counts.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "source", type=Path, help="a run's folder, an open_clip folder or weights file, or a CLIPModel folder"
    )
    parser.add_argument(
        "--format",
        nargs="+",
        required=True,
        choices=(*NAMES, ALL),
        help="one or several: %(choices)s (those that the model has)",
        metavar="FORMAT",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="results go to DIR/FORMAT")
    parser.add_argument("--alpha", type=float, default=1.0, help="safety dial: 0 frozen, 1 as trained (default: 1)")
    parser.add_argument("--model", default="", help="open_clip's name of the model, for a weights file")
    parser.add_argument("--overwrite", action="store_true", help="replace DIR/FORMAT; the old one goes last")
    parser.add_argument(
        "--push-to-hub", metavar="REPO", help="also send it to the Hugging Face hub: NAME or OWNER/NAME"
    )
    parser.add_argument("--private", action="store_true", help="a new repository on the hub is private")
    given = parser.parse_args(words)
    return run_command(lambda: run(given), when_stopped="stopped; formats that were finished are kept")


def run(given: argparse.Namespace) -> int:
    """Export what the command line asks for; returns the exit code."""
    check_there(given.source)
    from ..storage.claim import claim  # these take seconds to import
    from . import FORMATS, ExportError, Unsupported, export, load_source
    from .hub import check_hub, push

    everything = ALL in given.format
    failures: list[int] = []

    def report(name: str, error: Exception) -> None:
        if everything and isinstance(error, Unsupported):
            print(f"{name}: left out, {error}", file=sys.stderr)
            return
        mistake(f"{name}: {error}")
        if not isinstance(error, (*MISTAKES, ExportError)):
            traceback.print_exception(error)
        failures.append(1 if isinstance(error, RuntimeError) else 2)

    if given.push_to_hub:
        check_hub(given.push_to_hub)
    formats = list(FORMATS) if everything else list(dict.fromkeys(given.format))
    with claim(given.out):
        source = load_source(given.source, given.model, given.alpha)
        differences = export(source, formats, given.out, given.overwrite, report)
    for name, difference in differences.items():
        print(f"{name}: {given.out / name} (read back, embeddings differ by at most {difference:.1e})")
    if given.push_to_hub and differences:
        print(f"sent to {push(given.out, list(differences), given.push_to_hub, given.private)}")
    return min(failures, default=0)


if __name__ == "__main__":
    sys.exit(main())
