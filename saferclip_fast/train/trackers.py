"""Other places for a run's figures: TensorBoard, Weights & Biases, MLflow, Trackio.

Each remembers in RUN_DIR/trackers.json what it calls the run, so that a resumed run goes on in the same place.
"""

from __future__ import annotations

import functools
import json
import uuid
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from ..config import TRACKERS, Config, flatten
from ..storage.files import save_json

RECORD = "trackers.json"


class Tracker(Protocol):
    """A place that figures go to."""

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Figures of a step by their names."""

    def flush(self) -> None:
        """Put what was written where a crash does not lose it, as far as the place can."""

    def close(self) -> None:
        """The run is over, or stopped."""


class TensorBoard:
    """Events in RUN_DIR/tensorboard; what an interrupted run wrote after its checkpoint is hidden."""

    def __init__(self, run_dir: Path, config: Config, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter  # slow to import

        self.writer = SummaryWriter(str(run_dir / "tensorboard"), purge_step=step + 1 if step else None)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def flush(self) -> None:
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()


class Wandb:
    """A run of Weights & Biases, which leaves out steps that it has already; a resumed run gives the same figures."""

    def __init__(self, run_dir: Path, config: Config, step: int) -> None:
        import wandb

        known = _remembered(run_dir, "wandb", lambda: uuid.uuid4().hex[:16])
        self.run: Any = wandb.init(
            project=config.log.project,
            name=run_dir.resolve().name,
            id=known,
            resume="allow",
            dir=str(run_dir),
            config=flatten(config),
        )

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self.run.log(dict(values), step=step)

    def flush(self) -> None:
        pass  # wandb writes to its own file as it goes

    def close(self) -> None:
        self.run.finish()


class Mlflow:
    """A run of MLflow, where MLFLOW_TRACKING_URI says; a figure that is written twice stays at its step."""

    def __init__(self, run_dir: Path, config: Config, step: int) -> None:
        from mlflow.tracking import MlflowClient

        self.client: Any = MlflowClient()

        def create() -> str:
            found = self.client.get_experiment_by_name(config.log.project)
            where = found.experiment_id if found else self.client.create_experiment(config.log.project)
            run_id = self.client.create_run(where, run_name=run_dir.resolve().name).info.run_id
            for name, value in flatten(config).items():
                self.client.log_param(run_id, name, str(value)[:500])  # longer ones are refused
            return run_id

        self.run_id = _remembered(run_dir, "mlflow", create)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self.client.log_metric(self.run_id, name, value, step=step)

    def flush(self) -> None:
        pass  # each call is written

    def close(self) -> None:
        self.client.set_terminated(self.run_id)


class Trackio:
    """A run of Trackio, on this machine."""

    def __init__(self, run_dir: Path, config: Config, step: int) -> None:
        import trackio

        name = _remembered(run_dir, "trackio", lambda: f"{run_dir.resolve().name}-{uuid.uuid4().hex[:6]}")
        trackio.init(project=config.log.project, name=name, resume="allow", config=flatten(config))
        self.trackio: Any = trackio

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self.trackio.log(dict(values), step=step)

    def flush(self) -> None:
        pass

    def close(self) -> None:
        self.trackio.finish()


PLACES: dict[str, Callable[[Path, Config, int], Tracker]] = {
    "tensorboard": TensorBoard,
    "wandb": Wandb,
    "mlflow": Mlflow,
    "trackio": Trackio,
}
assert tuple(PLACES) == TRACKERS


class Trackers:
    """All places of a run. One that fails is given up with a warning: log.jsonl has all, and training goes on."""

    def __init__(self, run_dir: Path, config: Config, step: int) -> None:
        self.places: dict[str, Tracker] = {}
        for name in chosen(config):
            self._try(name, functools.partial(self._open, name, run_dir, config, step))

    def _open(self, name: str, run_dir: Path, config: Config, step: int) -> None:
        self.places[name] = PLACES[name](run_dir, config, step)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Figures of a step by their names."""
        self._all(lambda place: place.write(step, values))

    def flush(self) -> None:
        """Before a checkpoint."""
        self._all(lambda place: place.flush())

    def close(self) -> None:
        """The run is over, or stopped."""
        self._all(lambda place: place.close())

    def _all(self, call: Callable[[Tracker], None]) -> None:
        for name, place in list(self.places.items()):
            self._try(name, functools.partial(call, place))

    def _try(self, name: str, call: Callable[[], None]) -> None:
        try:
            call()
        except Exception as error:  # theirs are of any type, and no figure is worth a run
            self.places.pop(name, None)
            warnings.warn(
                f"log.to: {name} failed ({type(error).__name__}: {error}) and is given up; log.jsonl has every figure",
                stacklevel=2,
            )


def chosen(config: Config) -> list[str]:
    """The places that the options name, each once."""
    return list(dict.fromkeys([*(["tensorboard"] if config.log.tensorboard else []), *config.log.to]))


def _remembered(run_dir: Path, name: str, make: Callable[[], str]) -> str:
    """What the place `name` calls this run, made where the run is new."""
    file = run_dir / RECORD
    try:
        known = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    except ValueError:
        known = {}  # damaged: the figures go on in a new place
    if not isinstance(known, dict) or not isinstance(known.get(name), str):
        known = {**(known if isinstance(known, dict) else {}), name: make()}
        save_json(file, known)
    return known[name]
