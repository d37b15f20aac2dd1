"""A run's own config.yaml, read back: whole, and of the run whose folder it lies in."""

from __future__ import annotations

from pathlib import Path

from ..config import Config, ConfigError, Given, flatten, load_config, options
from .checkpoint import FREE_TO_CHANGE, PLACES, ROUNDING_ONLY, CheckpointError, newest_state

CONFIG = "config.yaml"
_MAY_DIFFER = FREE_TO_CHANGE + PLACES + ROUNDING_ONLY


def read_run_config(run_dir: str | Path, given: Given = ()) -> Config:
    """The options of the run in `run_dir`, with those that are `given` over them.

    A run writes every option, so a file that lacks some is not taken for one that leaves them at their defaults.

    Raises ConfigError for a file that is missing, empty, cut off or of another run, and for bad options.
    """
    run_dir = Path(run_dir)
    file = run_dir / CONFIG
    config = load_config(file)
    text = file.read_text(encoding="utf-8")
    last = list(options())[-1].key.rpartition(".")[2]
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not lines or not lines[-1].startswith(f"{last}:"):
        raise ConfigError(f"{file} is empty or cut off: {_remedy(run_dir)}")
    then = (newest_state(run_dir / "checkpoints") or {}).get("config", {})
    now = flatten(config)
    differ = [f"{k}={now[k]} (was {then[k]})" for k in now if k in then and now[k] != then[k]]
    differ = [difference for difference in differ if not difference.startswith(_MAY_DIFFER)]
    if differ:
        raise ConfigError(f"{file} is not what this run was trained with: {', '.join(differ)}; {_remedy(run_dir)}")
    return load_config(file, given) if given else config


def check_unused(config: Config) -> None:
    """Raises CheckpointError where run_dir holds a run that the options do not go on with."""
    if config.resume == "never" and (Path(config.run_dir) / "log.jsonl").exists():
        raise CheckpointError(
            f"{config.run_dir} holds a run: pass resume=auto to go on with it, or choose another run_dir"
        )


def _remedy(run_dir: Path) -> str:
    return f"put it back from a copy, or repeat the training's last command with resume=auto, run_dir={run_dir}"
