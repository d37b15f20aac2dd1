"""Fine-tune a CLIP for safety: python -m saferclip_fast.train --config FILE key=value ..."""

from __future__ import annotations

import argparse
import itertools
import math
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import DataLoader

from .checkpoint import (
    CheckpointError,
    CheckpointFolder,
    check_same_run,
    pack_optimizer,
    pack_rng,
    unpack_optimizer,
    unpack_rng,
)
from .config import Config, ConfigError, flatten, load_config, option_help
from .data import CurriculumSampler, DataError, collate
from .data.curriculum import STAGES
from .device import grad_scaler, set_up_torch
from .ema import WeightAverage
from .files import atomic_write, remove_leftovers, save_tensors
from .models import ClipModel, load_clip
from .objectives import Objective, ObjectiveOutput, QuadrupletEmbeddings, SafeClip, SaferClip, ShieldClip
from .optim import build_optimizer, learning_rate
from .prepare import Split, TrainingData, prepare
from .runlog import Meter, RunLog
from .step import check_micro_batches, embed_micro_batches, forward_backward
from .stop import ignore_stop_signals, stop_signals

# What a user can mend: reported in one line, without a traceback.
MISTAKES = (ConfigError, CheckpointError, DataError, FloatingPointError, OSError, ValueError)


@dataclass
class Progress:
    """Where a run stands; everything that a checkpoint needs besides tensors."""

    step: int = 0
    epoch: int = 1
    seen: int = 0  # samples of this epoch
    best_loss: float | None = None  # of the validations so far
    best_step: int = 0
    stale: int = 0  # validations since the best one
    finished: bool = False
    log_bytes: int = 0


class TrainResult(NamedTuple):
    weights: Path | None  # the exported open_clip weights, None if a signal stopped the run before its end
    progress: Progress
    stopped_by: int = 0  # the signal


class Trainer:
    """One run: the model, the objective and the optimizer over prepared data."""

    def __init__(self, config: Config, clip: ClipModel, data: TrainingData) -> None:
        """`clip` has its trainable parameters set."""
        self.config, self.clip, self.data, self.device = config, clip, data, clip.device
        self.run_dir = Path(config.run_dir)
        self.trainable = {n: p for n, p in clip.model.named_parameters() if p.requires_grad}
        self.objective = build_objective(config)
        self.optimizer = build_optimizer(config.optimizer, self.trainable)
        self.scaler = grad_scaler(self.device, config.train.precision)
        self.average = WeightAverage(self.trainable, config.train.ema) if config.train.ema else None
        stages = STAGES if config.curriculum.enabled else (1.0,)
        self.sampler = CurriculumSampler(data.similarity, config.seed, stages)
        sizes = [self.sampler.epoch_size(epoch) for epoch in range(1, config.train.epochs + 1)]
        # a last, smaller batch is left out unless it is the only one; the order differs in every epoch
        self.drop_last = min(sizes) >= config.train.batch_size
        rounded = math.floor if self.drop_last else math.ceil
        self.total_steps = sum(rounded(size / config.train.batch_size) for size in sizes)
        self.checkpoints = CheckpointFolder(self.run_dir / "checkpoints", config.checkpoint.keep)
        self.best_file = self.run_dir / "best.safetensors"
        self.progress = Progress()
        self.meter = Meter()

    def fit(self) -> TrainResult:
        """Train from where `self.progress` stands to the end, or until SIGTERM or Ctrl-C."""
        config, progress = self.config, self.progress
        self.log = RunLog(
            self.run_dir,
            offset=progress.log_bytes,
            step=progress.step,
            tensorboard=config.log.tensorboard,
            progress=config.log.progress,
        )
        loader = self.loader(self.data.train, self.sampler, self.drop_last)
        with stop_signals() as stop:
            while progress.epoch <= config.train.epochs and not progress.finished:
                self.sampler.set_epoch(progress.epoch, progress.seen)
                self.log.start_epoch(
                    progress.epoch, config.train.epochs, self.sampler.epoch_size(progress.epoch), progress.seen
                )
                self.clip.train()
                remaining = len(loader)
                self.clock = time.perf_counter()
                for batch in loader:
                    self.step(batch)
                    remaining -= 1
                    if stop:
                        return self.stopped(stop[0])
                    if progress.step % config.checkpoint.every_steps == 0 and remaining:
                        self.save()
                self.end_epoch()
                if stop:
                    return self.stopped(stop[0])
        self.log.close()
        return TrainResult(self.export(), progress)

    def step(self, batch: dict[str, Any]) -> None:
        """One optimizer step on a collated batch. Reads nothing back from the device but in logged steps."""
        config, progress = self.config, self.progress
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(config.optimizer, progress.step, self.total_steps)
        out = forward_backward(
            self.clip,
            batch,
            lambda current: self.loss(current, batch, self.data.train),
            micro_batch_size=config.train.micro_batch_size,
            precision=config.train.precision,
            scale=self.scaler.scale,
        )
        if progress.step == 0:
            check_all_used(self.trainable)
        if config.optimizer.clip_norm:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.trainable.values(), config.optimizer.clip_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        samples = len(batch["index"])
        progress.step += 1
        if self.average is not None:
            self.average.update(progress.step)
        progress.seen += samples
        self.meter.add({"loss": out.loss, **out.terms}, samples)
        shown = self.log_step() if progress.step % config.log.every_steps == 0 else None
        self.log.advance(samples, shown)

    def loss(self, current: QuadrupletEmbeddings, batch: dict[str, Any], split: Split) -> ObjectiveOutput:
        """The objective of one batch's embeddings against the cached frozen outputs."""
        index = batch["index"]
        offline = self.config.objective.neighbors == "offline"
        return self.objective(
            current,
            split.frozen_rows(index, self.device),
            self.data.bank,
            split.neighbor_rows(index, self.device) if offline else None,
            batch["unsafe_text_label"].to(self.device) if split.mixed else None,
            batch["unsafe_image_label"].to(self.device) if split.mixed else None,
        )

    def log_step(self) -> dict[str, float]:
        samples = self.meter.weight
        means = self.meter.means()
        self.check_finite(means)
        now = time.perf_counter()
        rate, self.clock = samples / (now - self.clock), now
        lr = self.optimizer.param_groups[0]["lr"]
        progress = self.progress
        self.log.write("train", progress.step, means, epoch=progress.epoch, lr=lr, samples_per_second=rate)
        return {name: means[name] for name in ("loss", *self.objective.SHOWN)}

    def check_finite(self, means: dict[str, float]) -> None:
        """Raises FloatingPointError if training has diverged."""
        if not all(map(math.isfinite, means.values())):
            raise FloatingPointError(
                f"the loss is not finite after step {self.progress.step} ({means}): lower optimizer.lr, set "
                "optimizer.clip_norm, or use train.precision=fp32; the last checkpoint is from before"
            )

    def end_epoch(self) -> None:
        """Validate if it is time, move to the next epoch, save."""
        config, progress = self.config, self.progress
        self.log.end_epoch()
        if self.data.val is not None and progress.epoch % config.validation.every_epochs == 0:
            with self.averaged():
                self.end_validation(self.validate(self.data.val))
        progress.epoch += 1
        progress.seen = 0
        progress.finished = progress.finished or progress.epoch > config.train.epochs
        self.save()

    def end_validation(self, means: dict[str, float]) -> None:
        """Log what validation gave; keep the weights if they are the best so far."""
        progress = self.progress
        self.check_finite(means)
        self.log.write("val", progress.step, means, epoch=progress.epoch)
        if progress.best_loss is None or means["loss"] < progress.best_loss:
            progress.best_loss, progress.best_step, progress.stale = means["loss"], progress.step, 0
            save_tensors(self.best_file, self.trained_tensors(), {"step": str(progress.step)})
        else:
            progress.stale += 1
            progress.finished = 0 < self.config.validation.patience <= progress.stale

    def averaged(self) -> AbstractContextManager:
        """The model holds the averaged weights inside, if train.ema asks for an average."""
        return nullcontext() if self.average is None else self.average.applied()

    @torch.no_grad()
    def validate(self, split: Split) -> dict[str, float]:
        """Means of the loss and its terms over `split`."""
        self.clip.eval()
        options, meter = self.config.train, Meter()
        for batch in self.loader(split, None, drop_last=False):
            current = embed_micro_batches(self.clip, batch, options.micro_batch_size, options.precision)
            out = self.loss(current, batch, split)
            meter.add({"loss": out.loss, **out.terms}, len(batch["index"]))
        return meter.means()

    def loader(self, split: Split, sampler: CurriculumSampler | None, drop_last: bool) -> DataLoader:
        workers = self.config.data.num_workers
        return DataLoader(
            split.samples,
            self.config.train.batch_size,
            sampler=sampler,
            collate_fn=collate(self.clip.tokenizer),
            num_workers=workers,
            drop_last=drop_last,
            pin_memory=self.device.type == "cuda",
            persistent_workers=workers > 0 and sampler is not None,
            worker_init_fn=ignore_stop_signals,
            generator=torch.Generator(),  # leaves the global generator alone
        )

    def trained_tensors(self) -> dict[str, Tensor]:
        """What training changes: trainable parameters and, in full tuning, buffers (batch norm)."""
        tensors: dict[str, Tensor] = {f"model.{name}": p for name, p in self.trainable.items()}
        if self.config.model.tuning == "full":
            names = dict(self.clip.model.named_buffers())
            tensors |= {f"model.{n}": t for n, t in self.clip.model.state_dict().items() if n in names}
        return tensors

    def load_trained(self, tensors: dict[str, Tensor]) -> None:
        """Inverse of trained_tensors."""
        own = self.clip.model.state_dict()
        with torch.no_grad():
            for key in self.trained_tensors():
                own[key.removeprefix("model.")].copy_(tensors[key])

    def save(self) -> None:
        """Write a checkpoint of everything that the next step depends on."""
        if self.meter.total is not None and not torch.isfinite(self.meter.total).all():
            self.log_step()  # raises
        self.progress.log_bytes = self.log.sync()
        tensors = self.trained_tensors() | pack_optimizer(self.optimizer) | pack_rng(self.device)
        if self.meter.total is not None:
            tensors["meter.total"] = self.meter.total
        if self.average is not None:
            tensors |= self.average.pack()
        state = {
            "progress": asdict(self.progress),
            "scaler": self.scaler.state_dict(),
            "meter": {"names": self.meter.names, "weight": self.meter.weight},
            "config": flatten(self.config),
            **self.hashes(),
        }
        self.checkpoints.save(self.progress.step, tensors, state)

    def restore(self) -> bool:
        """Continue from the newest readable checkpoint; False if there is none.

        Raises CheckpointError where the run would not be the same: other options, weights or data.
        """
        checkpoint = self.checkpoints.load_newest()
        if checkpoint is None:
            return False
        tensors, state = checkpoint.tensors, checkpoint.state
        check_same_run(checkpoint.path, state, flatten(self.config), self.hashes())
        self.load_trained(tensors)
        unpack_optimizer(self.optimizer, tensors)
        unpack_rng(self.device, tensors)
        if self.average is not None:
            self.average.unpack(tensors)
        self.scaler.load_state_dict(state["scaler"])
        self.progress = Progress(**state["progress"])
        self.meter.names, self.meter.weight = state["meter"]["names"], state["meter"]["weight"]
        if "meter.total" in tensors:
            self.meter.total = tensors["meter.total"].to(self.device)
        print(f"resumed {checkpoint.path}: step {self.progress.step}, epoch {self.progress.epoch}", flush=True)
        return True

    def hashes(self) -> dict[str, str]:
        return {"weights_hash": self.clip.weights_hash, "data_hash": self.data.data_hash}

    def stopped(self, number: int) -> TrainResult:
        self.save()
        self.log.close()
        name = signal.Signals(number).name
        print(f"{name}: saved step {self.progress.step}; go on with resume=auto", flush=True)
        return TrainResult(None, self.progress, number)

    def export(self) -> Path:
        """Write the final weights, of the best validation or the last step, for open_clip."""
        if self.config.validation.final == "best" and self.progress.best_loss is not None:
            self.load_trained(load_file(self.best_file))  # averaged ones, where there is an average
            return self.clip.export(self.run_dir / "final")
        with self.averaged():
            return self.clip.export(self.run_dir / "final")


def build_objective(config: Config) -> Objective:
    """The objective that the options describe."""
    options = config.objective
    if options.name == "safeclip":
        return SafeClip(targets=options.targets, logit_scale=options.logit_scale, backend=options.backend)
    if options.name == "shieldclip":
        return ShieldClip(logit_scale=options.logit_scale, backend=options.backend)
    return SaferClip(
        asdict(options.weights),
        k=options.k,
        tau=options.tau,
        beta=options.beta,
        margin=options.margin,
        negative=options.negative,
        logit_scale=options.logit_scale,
        backend=options.backend,
    )


def check_all_used(parameters: dict[str, nn.Parameter]) -> None:
    """Raises ValueError if a trainable parameter took no part in the first backward pass."""
    unused = [name for name, p in parameters.items() if p.grad is None]
    if unused:
        shown = ", ".join(itertools.islice(unused, 3))
        raise ValueError(
            f"{len(unused)} trainable parameters take no part in the embeddings ({shown} ...): "
            "choose other lora.targets for this model"
        )


def train(config: Config) -> TrainResult:
    """Fine-tune as `config` says; results go to `config.run_dir`.

    Writes config.yaml, log.jsonl, tensorboard/, checkpoints/, best.safetensors and final/ (for open_clip).

    Raises:
        ConfigError, ValueError, FileNotFoundError: options, model or data that do not fit; the message has the remedy.
        CheckpointError: a used run_dir without resume=auto, or a checkpoint of another run.
        FloatingPointError: the loss is not finite.
        OSError: a file could not be written.
    """
    run_dir = Path(config.run_dir)
    if config.resume == "never" and (run_dir / "log.jsonl").exists():
        raise CheckpointError(f"{run_dir} holds a run: pass resume=auto to go on with it, or choose another run_dir")
    device = set_up_torch(config)
    clip = load_clip(config.model.name, config.model.pretrained, device)
    data = prepare(config, clip)
    torch.manual_seed(config.seed)  # the same adapters whether the caches were warm or not
    if config.model.tuning == "lora":
        clip.add_lora(config.lora.rank, config.lora.alpha, config.lora.dropout, config.lora.targets)
    else:
        clip.unfreeze()
    check_micro_batches(clip, config.train.micro_batch_size, config.train.batch_size)
    if config.train.checkpointing:
        clip.model.set_grad_checkpointing()
    trainer = Trainer(config, clip, data)
    for folder in (run_dir, run_dir / "final"):
        remove_leftovers(folder)
    if config.resume == "auto":
        trainer.restore()
    with atomic_write(run_dir / "config.yaml") as file:
        OmegaConf.save(OmegaConf.structured(config), file)
    return trainer.fit()


def main(words: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code: 0 done, 2 a mistake in the options or data, 143/130 stopped and saved."""
    parser = argparse.ArgumentParser(
        prog="python -m saferclip_fast.train",
        description="Fine-tune a CLIP for safety with SafeR-CLIP.",
        epilog="options (key=value):\n" + option_help(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", metavar="FILE", help="YAML file, or the name of a shipped one (paper)")
    parser.add_argument("--resume", metavar="auto|never", help="same as resume=...")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="options over those of the file")
    arguments = parser.parse_intermixed_args(words)
    overrides = list(arguments.overrides) + ([f"resume={arguments.resume}"] if arguments.resume else [])
    try:
        result = train(load_config(arguments.config, overrides))
    except MISTAKES as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if result.weights is None:
        return 128 + result.stopped_by
    print(f"done: step {result.progress.step}, weights in {result.weights}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
