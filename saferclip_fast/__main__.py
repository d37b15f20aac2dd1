"""Every command in one: saferclip COMMAND ..., or python -m saferclip_fast COMMAND ..."""

from __future__ import annotations

import argparse
import difflib
import importlib
import sys
from collections.abc import Sequence

from .cli import mistake
from .version import __version__

COMMANDS = {  # command -> the folder whose __main__ it is, and what it does
    "train": ("train", "fine-tune a CLIP for safety"),
    "evaluate": ("evaluate", "measure how safe and how useful a CLIP is"),
    "guard": ("guard", "fit P(unsafe) of a text or an image"),
    "gate": ("gate", "embed only unsafe inputs with the tuned model"),
    "report": ("report", "one HTML page on one run or several"),
    "export": ("export", "write a tuned model for open_clip, Hugging Face, PEFT or ONNX"),
    "restore": ("restore", "put back the safety that a later fine-tuning took"),
    "patch": ("patch", "teach a safe model a new kind of unsafe content from a few pairs"),
    "generate": ("generate", "count the harmful images of a diffusion pipeline with the tuned encoder"),
    "describe": ("describe", "count the harmful texts that a model writes for images with the tuned encoder"),
    "label": ("label_images", "label a table's unsafe images by a classifier"),
    "tune": ("tune", "measure the ops' backends on this machine"),
    "demo": ("demo", "the whole job on drawn scenes, in minutes"),
    "doctor": ("doctor", "what works on this machine, and a self-check"),
}
EPILOG = "\n".join(
    [
        "commands:",
        *(f"  {command:10}{meaning}" for command, (_, meaning) in COMMANDS.items()),
        "",
        "saferclip COMMAND --help says more on each; python -m saferclip_fast COMMAND is the same.",
    ]
)


def main(words: Sequence[str] | None = None) -> int:
    """Runs the command that the first word names, or prints the help; returns the exit code, 2 for no such command."""
    parser = argparse.ArgumentParser(
        prog="saferclip",
        description="Make a CLIP safe with the smallest change that does it.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"saferclip_fast {__version__}")
    parser.add_argument("command", metavar="COMMAND", help="one of those below")
    parser.add_argument("words", nargs=argparse.REMAINDER, metavar="...", help="what the command takes")
    words = sys.argv[1:] if words is None else words
    if not words:
        parser.print_help()
        return 0
    given = parser.parse_args(words)
    if given.command not in COMMANDS:
        near = difflib.get_close_matches(given.command, COMMANDS, 1)
        hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(COMMANDS)}"
        return mistake(f"no command {given.command!r}, {hint}")
    folder, _ = COMMANDS[given.command]
    command = importlib.import_module(f"{__package__}.{folder}.__main__")
    return command.main(given.words, prog=f"saferclip {given.command}")


if __name__ == "__main__":
    sys.exit(main())
