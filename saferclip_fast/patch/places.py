"""What can be known of a patch by its words: checked before torch is imported."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..config import ConfigError
from ..data.places import check_place
from ..storage.claim import LOCK

FEW = 32  # pairs that a patch is measured for
MAX_LOSS = 0.005  # on what was trained on; other data loses more
STAGE = ".patch"  # in `out`, while it is written


@dataclass(frozen=True)
class Recipe:
    """How a patch is fitted; chosen on validation data (docs/patch.md)."""

    steps: int = 80
    lr: float = 2e-3
    rank: int = 16
    warmup: int = 5  # steps
    replayed: int = 16  # quadruplets of the run in a batch
    shown: int = 16  # pairs in a batch, at most


def check_run(run: str | Path) -> None:
    """Raises FileNotFoundError where nothing is there, ConfigError for what is no run."""
    path = Path(run)
    if not path.exists():
        raise FileNotFoundError(f"there is no folder {path}: give the folder of the run that made the model safe")
    if not (path / "config.yaml").is_file():
        raise ConfigError(f"{path} is no run: give the folder of the run that made the model safe (it has config.yaml)")


def check_pairs(source: str) -> None:
    """Raises DataError or ValueError where nothing is there or its format is unknown."""
    if not source.endswith(".json"):  # whose root is an option
        check_place(source)


def check_out(out: Path) -> None:
    """Raises FileExistsError where `out` holds files: it may be another model's folder, or the run's."""
    if out.is_dir() and any(file.name not in (LOCK, STAGE) for file in out.iterdir()):
        raise FileExistsError(f"{out} holds files already, and a model there would be replaced: choose another --out")


def check_recipe(steps: int, lr: float, rank: int, max_loss: float) -> None:
    """Raises ValueError for a number that means nothing."""
    if steps < 1:
        raise ValueError(f"--steps is how many steps are taken, 1 or more, got {steps}")
    if not 0 < lr < 1:
        raise ValueError(f"--lr is the peak of the learning rate, above 0 and below 1 (1e-3), got {lr:g}")
    if rank < 1:
        raise ValueError(f"--rank is the rank of the change, 1 or more, got {rank}")
    if not 0 < max_loss <= 1:
        raise ValueError(f"--max-loss is a share, above 0 to 1 (0.005: half a point), got {max_loss:g}")
