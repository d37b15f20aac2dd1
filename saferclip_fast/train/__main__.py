"""Fine-tune a CLIP for safety: python -m saferclip_fast.train --config FILE key=value ..."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence

from ..cli import run_command
from ..config import Config, load_config, option_help
from .places import check_places

LESS_MEMORY = "the same gradient in less memory: train.micro_batch_size=16, train.checkpointing=true"


def main(words: Sequence[str] | None = None, prog: str = "python -m saferclip_fast.train") -> int:
    """Command line; returns the exit code: 0 done or saved on SIGTERM, 130 saved on Ctrl-C, 2 a mistake."""
    parser = argparse.ArgumentParser(
        prog=prog,
        description="Fine-tune a CLIP for safety with SafeR-CLIP.",
        epilog="options (key=value):\n" + option_help(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", metavar="FILE", help="YAML file, or the name of a shipped one (paper)")
    parser.add_argument("--resume", metavar="auto|never", help="same as resume=...")
    parser.add_argument("--print-config", action="store_true", help="print every option as it would be, and stop")
    parser.add_argument(
        "--dry-run", action="store_true", help="check options, data and model; say steps, memory and time, and stop"
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="options over those of the file")
    given = parser.parse_intermixed_args(words)
    overrides = list(given.overrides) + ([f"resume={given.resume}"] if given.resume else [])
    what = print_config if given.print_config else plan if given.dry_run else run
    return run_command(lambda: what(load_config(given.config, overrides)), less_memory=LESS_MEMORY)


def print_config(config: Config) -> int:
    """Print the options as a YAML file that --config takes; returns the exit code."""
    from omegaconf import OmegaConf

    print(OmegaConf.to_yaml(OmegaConf.structured(config)), end="")
    return 0


def plan(config: Config) -> int:
    """Say what a run would be; returns the exit code."""
    check_places(config)
    from .dry_run import dry_run

    print("\n".join(dry_run(config)))
    return 0


def run(config: Config) -> int:
    """Train as the options say; returns the exit code."""
    check_places(config)
    from . import train  # after the options are known to be right: torch and open_clip take seconds to import

    result = train(config)
    if result.weights is None:
        return 0 if result.stopped_by == signal.SIGTERM else 128 + result.stopped_by
    print(f"done: step {result.progress.step}, weights in {result.weights}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
