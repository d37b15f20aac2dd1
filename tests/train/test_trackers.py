"""Other places for a run's figures: the same as in log.jsonl, also after a run was resumed; none of them ends a run."""

import importlib.util
import json
import sys
import types
import warnings

import pytest
import torch

import saferclip_fast as sf
from saferclip_fast.config import ConfigError, load_config
from saferclip_fast.train import Callbacks, train
from saferclip_fast.train.places import check_installed
from tests.support import tiny as support


class Crash(Exception):
    pass


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    torch.manual_seed(7)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return sf.load_clip("ViT-tiny-8-32").export(tmp_path_factory.mktemp("weights"))


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


def interrupted(run_dir, weights, cache, *options) -> None:
    """A run that crashes after step 7, past its checkpoint of step 6, and goes on."""

    def crash(info):
        if info.step == 7:
            raise Crash

    words = ("train.epochs=2", "log.every_steps=1", "checkpoint.every_steps=2", *options)
    with pytest.raises(Crash):
        train(support.tiny(run_dir, weights, cache, *words), Callbacks(on_step=crash))
    train(support.tiny(run_dir, weights, cache, *words, "resume=auto"))


def logged(run_dir) -> dict[tuple[str, int], float]:
    lines = [json.loads(line) for line in (run_dir / "log.jsonl").read_text().splitlines()]
    return {(f"{line['kind']}/loss", line["step"]): line["loss"] for line in lines}


class FakeMlflow:
    """What MlflowClient does, kept in memory."""

    runs: dict = {}  # noqa: RUF012 - one server
    created = 0

    def get_experiment_by_name(self, name):
        return None

    def create_experiment(self, name):
        return f"experiment of {name}"

    def create_run(self, where, run_name):
        FakeMlflow.created += 1
        self.runs["r1"] = {"name": run_name, "where": where, "params": {}, "metrics": {}, "ended": 0}
        return types.SimpleNamespace(info=types.SimpleNamespace(run_id="r1"))

    def log_param(self, run_id, name, value):
        assert len(value) <= 500 and name not in self.runs[run_id]["params"]
        self.runs[run_id]["params"][name] = value

    def log_metric(self, run_id, name, value, step):
        self.runs[run_id]["metrics"][name, step] = value

    def set_terminated(self, run_id):
        self.runs[run_id]["ended"] += 1


def fake(monkeypatch, **modules) -> None:
    for name, content in modules.items():
        module = types.ModuleType(name)
        module.__dict__.update(content)
        module.__spec__ = importlib.util.spec_from_loader(name, loader=None)
        monkeypatch.setitem(sys.modules, name, module)


def test_mlflow_has_the_log_of_one_run(weights, cache, tmp_path, monkeypatch):
    FakeMlflow.runs.clear()
    monkeypatch.setattr(FakeMlflow, "created", 0)
    fake(monkeypatch, mlflow={}, **{"mlflow.tracking": {"MlflowClient": FakeMlflow}})
    interrupted(tmp_path / "run", weights, cache, "log.to=[mlflow]", "log.project=mine")
    (run,) = FakeMlflow.runs.values()
    assert FakeMlflow.created == 1 and run["name"] == "run" and run["where"] == "experiment of mine"
    assert run["params"]["optimizer.lr"] == "0.001" and run["ended"] == 1
    assert logged(tmp_path / "run").items() <= run["metrics"].items()
    assert {name for name, _ in run["metrics"]} >= {"train/lr", "val/recall", "train/samples_per_second"}


def test_trackio_goes_on_under_the_same_name(weights, cache, tmp_path, monkeypatch):
    started, rows = [], {}

    def init(project, name, resume, config):
        started.append((project, name, resume, config["seed"]))

    def log(values, step):
        rows.update({(name, step): value for name, value in values.items()})

    fake(monkeypatch, trackio={"init": init, "log": log, "finish": lambda: started.append("finished")})
    interrupted(tmp_path / "run", weights, cache, "log.to=[trackio]")
    first, second, end = started
    assert first == second and first[0] == "saferclip" and first[1].startswith("run-") and end == "finished"
    assert logged(tmp_path / "run").items() <= rows.items()


def test_tensorboard_by_either_option_once(weights, cache, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    interrupted(tmp_path / "run", weights, cache, "log.to=[tensorboard]", "log.tensorboard=true")
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    found = {("train/loss", event.step): event.value for event in events.Scalars("train/loss")}
    wanted = {key: value for key, value in logged(tmp_path / "run").items() if key[0] == "train/loss"}
    assert found == pytest.approx(wanted) and len(events.Scalars("train/loss")) == len(wanted)


def test_wandb_without_a_network(weights, cache, tmp_path, monkeypatch):
    """Offline, as `wandb sync` takes it later: two folders, one before the crash and one after it, under one id."""
    for name, value in {"WANDB_MODE": "offline", "WANDB_SILENT": "true"}.items():
        monkeypatch.setenv(name, value)
    for name in ("WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "wandb-home"))
    interrupted(tmp_path / "run", weights, cache, "log.to=[wandb]")
    known = json.loads((tmp_path / "run" / "trackers.json").read_text())["wandb"]
    folders = sorted((tmp_path / "run" / "wandb").glob(f"offline-run-*-{known}"))
    assert folders and sorted((tmp_path / "run" / "wandb").glob("offline-run-*")) == folders
    content = b"".join(file.read_bytes() for folder in folders for file in folder.glob("*.wandb"))
    assert b"train/loss" in content and b"val/recall" in content and b"optimizer.lr" in content


@pytest.mark.parametrize("where", ["start", "write", "close"])
def test_a_place_that_fails_is_given_up_and_the_run_goes_on(weights, cache, tmp_path, monkeypatch, where):
    def fail(*values, **named):
        raise ConnectionError("no route")

    calls = {"init": "start", "log": "write", "finish": "close"}
    content = {name: fail if call == where else (lambda *values, **named: None) for name, call in calls.items()}
    fake(monkeypatch, trackio=content)
    config = support.tiny(tmp_path / "run", weights, cache, "train.epochs=1", "log.to=[trackio]")
    with pytest.warns(UserWarning, match=r"log.to: trackio failed \(ConnectionError: no route\) and is given up"):
        result = train(config)
    assert result.weights is not None and logged(tmp_path / "run")


def test_names_and_packages_are_checked_before_anything_is_loaded(monkeypatch):
    with pytest.raises(ConfigError, match=r"log.to: no place is called 'wandbs', did you mean 'wandb'\?"):
        load_config(None, ["log.to=[wandbs]"])
    with pytest.raises(ConfigError, match=r"log.to: no place is called 'x', choose from tensorboard, wandb"):
        load_config(None, {"log.to": ["x"]})
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        ConfigError, match=r"log.to=\['mlflow'\]: mlflow is not installed: pip install mlflow, or leave"
    ):
        check_installed(load_config(None, ["log.to=[mlflow]"]))
