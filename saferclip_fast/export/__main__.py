"""Put a fine-tuned model to use elsewhere: python -m saferclip_fast.export RUN --format huggingface --out DIR"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from ..train import MISTAKES
from . import FORMATS, ExportError, export, load_source


def main(words: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code: 0 done, 2 a mistake in what was asked for, 1 a wrong export."""
    parser = argparse.ArgumentParser(
        prog="python -m saferclip_fast.export",
        description="Write a fine-tuned CLIP for open_clip, Hugging Face transformers, peft or ONNX. Each format is "
        "read back by its own library and compared with the model before it counts.",
    )
    parser.add_argument(
        "source", type=Path, help="a run's folder, an open_clip folder or weights file, or a CLIPModel folder"
    )
    parser.add_argument(
        "--format", nargs="+", required=True, choices=FORMATS, help="one or several: %(choices)s", metavar="FORMAT"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="results go to DIR/FORMAT")
    parser.add_argument("--alpha", type=float, default=1.0, help="safety dial: 0 frozen, 1 as trained (default: 1)")
    parser.add_argument("--model", default="", help="open_clip's name of the model, for a weights file")
    parser.add_argument("--overwrite", action="store_true", help="replace what is in DIR/FORMAT")
    given = parser.parse_args(words)
    try:
        source = load_source(given.source, given.model, given.alpha)
        differences = export(source, given.format, given.out, given.overwrite)
    except (*MISTAKES, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except ExportError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for name, difference in differences.items():
        print(f"{name}: {given.out / name} (read back, embeddings differ by at most {difference:.1e})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
