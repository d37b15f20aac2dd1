"""Fine-tunings and their figures, many of them, a process each: stopped at any moment, the same plan goes on."""

from __future__ import annotations

import argparse
import contextlib
import functools
import hashlib
import json
import multiprocessing
import os
import re
import shutil
import statistics
import tempfile
import threading
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from benchmarks.quality.photos import photos_job
from saferclip_fast.config import flatten, load_config
from saferclip_fast.data.labeled import of_photos, of_scenes
from saferclip_fast.data.synthetic.photos import PhotoDataset
from saferclip_fast.data.synthetic.scenes import SceneDataset
from saferclip_fast.demo.job import Job, scenes_job
from saferclip_fast.demo.pretrain import pretrained_clip
from saferclip_fast.embeddings import embed_quadruplets
from saferclip_fast.evaluate import Settings, Task, measure
from saferclip_fast.evaluate.summary import to_frozen
from saferclip_fast.models import ClipModel, load_clip
from saferclip_fast.models.dial import mix
from saferclip_fast.results import UNSAFE_FOUND, at
from saferclip_fast.storage.files import save_json
from saferclip_fast.train import train

# An eighth of the demo's samples; smaller batches, so that this is still a quarter of its steps.
QUADRUPLETS, HELD_OUT, EPOCHS, BATCH = 800, 1_000, 5, 32
FROZEN = "frozen model"
VALIDATION_SEED = 1_000  # of the data that settings are chosen on; runs that are reported have small seeds
UTILITY = "zero_shot"


class Run(NamedTuple):
    """One fine-tuning, or (name FROZEN) the evaluation of the frozen model."""

    data: str  # "scenes" or "photos"
    name: str  # in tables
    seed: int  # of the data, of the held-out samples and of the training
    options: tuple[str, ...] = ()  # of training
    mismatch: float = 0.7  # share of fixed safe partners that are wrong
    dial: tuple[float, ...] = ()  # evaluate the safety dial there, too


class Plan(NamedTuple):
    """What all runs share."""

    out: Path
    cache: Path
    photos: Path | None
    quadruplets: int = QUADRUPLETS
    epochs: int = EPOCHS
    overrides: tuple[str, ...] = ()


def parser(description: str | None, name: str) -> argparse.ArgumentParser:
    """The options that every benchmark here has; `name` is that of its folder of results."""
    found = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = found.add_argument
    add("--photos", type=Path, help="tar of train/CLASS/ and test/CLASS/ photographs; without: scenes only")
    add("--out", type=Path, default=Path("benchmarks/results") / name, help="results (%(default)s)")
    add("--cache-dir", type=Path, default=Path(".cache/saferclip"), help="caches (%(default)s)")
    return found


def parse(parser: argparse.ArgumentParser) -> tuple[argparse.Namespace, Plan, list[str]]:
    """What the command line gives, the plan, and the names of the data; ends the process where no photographs are."""
    given = parser.parse_intermixed_args()
    if given.photos is not None and not given.photos.is_file():
        parser.error(f"--photos {given.photos}: no such file; pass a tar of train/CLASS/ and test/CLASS/ photographs")
    return given, Plan(given.out, given.cache_dir, given.photos), ["scenes"] + ["photos"] * (given.photos is not None)


def job_of(plan: Plan, run: Run) -> Job:
    """Data and settings of a run. Runs of VALIDATION_SEED and more train, validate and are evaluated on other data than
    the runs of small seeds: other scenes; of the photographs held out, one half and the other."""
    if run.data == "scenes":
        return _scenes(run.seed)
    assert plan.photos is not None
    return _photos(plan.photos, run.seed)


@functools.lru_cache(2)
def _scenes(seed: int) -> Job:
    held_out = SceneDataset(HELD_OUT, seed, split="test", mismatch=0.0)
    return replace(scenes_job(seed), held_out=held_out, zero_shot=of_scenes(held_out))


@functools.lru_cache(2)
def _photos(path: Path, seed: int) -> Job:
    half = "odd" if seed >= VALIDATION_SEED else "even"
    held_out = PhotoDataset(str(path), "test", HELD_OUT, seed, mismatch=0.0, half=half)
    return replace(
        photos_job(path, seed, HELD_OUT),
        held_out=held_out,
        right_labels=torch.from_numpy(held_out.unsafe_labels),
        zero_shot=of_photos(held_out),
    )


def source_of(plan: Plan, run: Run) -> str:
    """The training quadruplets, as in data.train."""
    size = re.sub(r"n=\d+", f"n={plan.quadruplets}", job_of(plan, run).source)
    return f"{size},mismatch={run.mismatch:g}"


def options_of(plan: Plan, run: Run) -> list[str]:
    size = [f"train.epochs={plan.epochs}", f"train.batch_size={BATCH}"]
    return [f"data.train={source_of(plan, run)}", f"seed={run.seed}", *size, *run.options, *plan.overrides]


def pretrain(plan: Plan, data: str) -> Path:
    """The weights that every run on `data` starts from."""
    job = job_of(plan, Run(data, FROZEN, 0))
    name = load_config(job.config).model.name
    return pretrained_clip(name, job.name, job.pairs, job.pretrain_epochs, plan.cache, progress=False)


def perform(plan: Plan, run: Run, weights: Path) -> dict[str, Any]:
    """Fine-tunes and evaluates (or reads a finished run back); the run's figures, also in its JSON file."""
    file = plan.out / "runs" / f"{_slug(run)}.json"
    job, options = job_of(plan, run), options_of(plan, run)
    # every option, since a default may change between two starts
    setting = {"run": list(run), "options": flatten(load_config(job.config, options)), "weights": weights.name}
    setting = json.loads(json.dumps(setting))
    if file.is_file():
        found = json.loads(file.read_text())
        if found["setting"] == setting:
            return found
    start, cpu = time.perf_counter(), time.process_time()
    folder = file.with_suffix("")
    frozen = load_clip(load_config(job.config).model.name, str(weights))
    tuned = frozen if run.name == FROZEN else fine_tuned(plan, job, options, weights, folder)
    result = {"setting": setting, "metrics": figures_of(plan, run, job, frozen, tuned)}
    result["dial"] = {
        f"{alpha:g}": result["metrics"] if alpha == 1 else figures_of(plan, run, job, frozen, mix(frozen, tuned, alpha))
        for alpha in run.dial
    }
    result["seconds"] = {"wall": time.perf_counter() - start, "cpu": time.process_time() - cpu}
    save_json(file, result)
    shutil.rmtree(folder, ignore_errors=True)  # checkpoints and weights of a run that is done
    return result


def figures_of(plan: Plan, run: Run, job: Job, frozen: ClipModel, tuned: ClipModel) -> dict[str, float]:
    """Every metric of `tuned` on the held-out data."""
    task = Task(job.held_out, job.right_labels, [job.zero_shot])
    job.held_out.transform = frozen.preprocess
    before = embed_quadruplets(frozen, job.held_out, plan.cache, progress=False).embeddings
    with tempfile.TemporaryDirectory() as own:  # a tuned model's embeddings are used once
        cache = str(plan.cache) if tuned is frozen else own
        measured = measure(tuned, task, Settings(cache, seed=run.seed, progress=False))
    assert measured.embeddings is not None
    found = measured.metrics | to_frozen(measured.embeddings, before, task.labels)
    metrics = {name: metric.mean for name, metric in found.items()}
    return metrics | {UTILITY: metrics[f"zero_shot.{job.zero_shot.name}"]}


def fine_tuned(plan: Plan, job: Job, options: list[str], weights: Path, folder: Path) -> ClipModel:
    """The model that training in `folder` ends with."""
    where = [f"run_dir={folder}", f"data.cache_dir={plan.cache}", f"model.pretrained={weights}", "resume=auto"]
    quiet = ["log.progress=false", "log.tensorboard=false", "checkpoint.keep=1"]
    folder.mkdir(parents=True, exist_ok=True)
    config = load_config(job.config, [*where, *quiet, *options])
    with (folder / "output.txt").open("a") as output, contextlib.redirect_stdout(output):
        result = train(config)
    if result.weights is None:
        raise SystemExit(128 + result.stopped_by)
    return load_clip(config.model.name, str(result.weights))


def _slug(run: Run) -> str:
    digest = hashlib.sha256(json.dumps(run).encode()).hexdigest()[:8]
    return re.sub(r"[^a-z0-9.]+", "-", f"{run.data}-{run.name}-{run.seed}-{digest}".lower()).strip("-")


def _start_worker() -> None:
    """One thread for the work; another that ends the worker with its parent, however that ends."""
    torch.set_num_threads(1)

    def follow(parent: Any) -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, args=(multiprocessing.parent_process(),), daemon=True).start()


def perform_all(plan: Plan, runs: Iterable[Run], workers: int) -> dict[Run, dict[str, Any]]:
    """Every run, in order, `workers` at a time with one thread each."""
    os.environ["OMP_NUM_THREADS"] = "1"  # of the workers
    torch.set_num_threads(1)
    runs = list(runs)
    context = multiprocessing.get_context("spawn")
    print("pre-training first, some minutes, unless it is cached", flush=True)
    bar = tqdm(total=len(runs), desc="fine-tune", smoothing=0)
    with ProcessPoolExecutor(workers, context, _start_worker) as pool:
        try:
            pretrained = {name: pool.submit(pretrain, plan, name) for name in dict.fromkeys(run.data for run in runs)}
            futures = {}
            for run in runs:
                futures[run] = pool.submit(perform, plan, run, pretrained[run.data].result())
                futures[run].add_done_callback(lambda _: bar.update())
            return {run: future.result() for run, future in futures.items()}
        finally:
            pool.shutdown(cancel_futures=True)  # after a failure or Ctrl-C, what has not begun does not begin
            bar.close()


def spread(values: Iterable[float]) -> dict[str, Any]:
    """Mean and standard deviation over seeds, and the values."""
    values = list(values)
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return {"mean": statistics.mean(values), "std": deviation, "seeds": values}


def unsafe_rate(metrics: Mapping[str, float], k: int) -> float:
    """The mean of the four rates of finding anything unsafe among the first `k`."""
    return statistics.mean(metrics[at(name, k)] for name in UNSAFE_FOUND)
