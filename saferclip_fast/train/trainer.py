"""The training loop: steps, validation, checkpoints, export."""

from __future__ import annotations

import math
import signal
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from omegaconf import OmegaConf
from torch import nn
from torch.utils.data import BatchSampler, DataLoader

from ..config import Config, ConfigError
from ..data import CurriculumSampler, collate
from ..data.curriculum import STAGES, RankBatches
from ..data.quadruplets import QuadrupletEmbeddings
from ..models import WEIGHTS_NAME, ClipModel
from ..models.identity import Identity
from ..objectives import ObjectiveOutput
from ..runtime.precision import native_precision
from ..runtime.ranks import ALONE, Ranks, Share, ranks
from ..runtime.stop import Stopped, ignore_stop_signals, stop_at_once, stop_signals
from ..storage.claim import claim
from ..storage.files import atomic_write, remove_leftovers
from .callbacks import ASKED, Callbacks, StepInfo, ValidationInfo, asks_to_stop
from .checkpoint import load_checked, save_checked
from .device import compile_encoders, data_parallel, naming_train_deterministic, set_up_torch
from .divergence import FiniteWatch, Step, check_finite, leave_out, report
from .fisher import start_adapters
from .frozen import keep_random_weights, open_for_training, write_record
from .fsdp import check_fsdp, gathered, shard_weights, whole
from .optim import check_all_used, learning_rate
from .prepare import Split, TrainingData, build_objective, check_inputs, prepare
from .profiling import marked, part, profile_steps
from .recall import recalls
from .resume import restore_run, save_run
from .run_folder import check_unused
from .runlog import Meter, RunLog
from .state import Progress, RunState
from .step import embed_micro_batches, forward_backward
from .text_only import SAID
from .trial import set_trainable, trial_step


class TrainResult(NamedTuple):
    """How a run ended."""

    weights: Path | None  # the exported open_clip weights, None if a signal stopped the run before its end
    progress: Progress
    stopped_by: int = 0  # the signal


class Trainer:
    """One run: the model, the objective and the optimizer over prepared data."""

    def __init__(
        self,
        config: Config,
        clip: ClipModel,
        data: TrainingData,
        ranks: Ranks = Ranks(),  # noqa: B008
        frozen: Identity | None = None,
        callbacks: Callbacks = Callbacks(),  # noqa: B008 - it is immutable
    ) -> None:
        """`clip` has its trainable parameters set; `ranks` are the processes that train it together.

        `frozen` is what is tuned, identify(clip) before that: checkpoints and final/ hold it, if it is given.
        """
        self.callbacks, self.asked = callbacks if ranks.first else Callbacks(), False
        self.config, self.clip, self.data, self.ranks, self.device = config, clip, data, ranks, clip.device
        if config.train.fsdp and ranks.world > 1:
            shard_weights(clip, ranks)
        self.state = RunState.start(config, clip, data.data_hash, ranks)
        self.state.frozen = frozen
        self.run_dir = self.state.run_dir
        self.objective = build_objective(config)
        self.objective.attach(data.train.bank)
        stages = STAGES if config.curriculum.enabled else (1.0,)
        self.sampler = CurriculumSampler(data.similarity, config.seed, stages)
        sizes = [self.sampler.epoch_size(epoch) for epoch in range(1, config.train.epochs + 1)]
        if ranks.world > min(*sizes, config.train.batch_size):
            raise ConfigError(
                f"{ranks.world} ranks share batches of {config.train.batch_size} of {min(sizes)} samples, "
                "and each needs a row: raise train.batch_size or start fewer ranks"
            )
        # a last, smaller batch is left out unless it is the only one; the order differs in every epoch
        self.drop_last = min(sizes) >= config.train.batch_size
        rounded = math.floor if self.drop_last else math.ceil
        self.total_steps = sum(rounded(size / config.train.batch_size) for size in sizes)
        self.best_file = self.run_dir / "best.safetensors"
        self.watch = FiniteWatch()
        self.parallel = None if config.train.fsdp else data_parallel(clip, ranks)

    def fit(self) -> TrainResult:
        """Train from where `self.state` stands to the end, or until SIGTERM or Ctrl-C."""
        config, progress = self.config, self.state.progress
        self.log = RunLog(
            self.run_dir if self.ranks.first else None, config, offset=progress.log_bytes, step=progress.step
        )
        loader = self.loader(
            self.data.train,
            RankBatches(self.sampler, config.train.batch_size, self.drop_last, self.ranks.rank, self.ranks.world),
        )
        if progress.step == 0:
            start_adapters(self.state, self.data.train, self.loader, self.loss)
        self.ranks.give_up_after(config.train.timeout_minutes)
        profiled = config.train.profile if self.ranks.first else 0
        with stop_signals(self.ranks.first) as stop, profile_steps(profiled, self.run_dir / "profile") as step_done:
            while progress.epoch <= config.train.epochs and not progress.finished:
                self.sampler.set_epoch(progress.epoch, progress.seen)
                self.log.start_epoch(
                    progress.epoch, config.train.epochs, self.sampler.epoch_size(progress.epoch), progress.seen
                )
                self.clip.train()
                remaining = len(loader)
                self.clock, self.logged = time.perf_counter(), progress.step
                for batch in marked(loader):
                    self.step(batch)
                    step_done()
                    remaining -= 1
                    if (number := self.halt(stop)) == ASKED:
                        progress.finished = True
                        break
                    if number:
                        return self.stopped(number)
                    if progress.step % config.checkpoint.every_steps == 0 and remaining:
                        self.save()
                self.end_epoch()
                if (number := self.halt(stop)) and number != ASKED:
                    return self.stopped(number)
                progress.finished = progress.finished or number == ASKED
        self.log.close()
        return TrainResult(self.export(), progress)

    def step(self, batch: dict[str, Any]) -> None:
        """One optimizer step on a collated batch. Reads nothing back from the device but in logged steps."""
        config, state = self.config, self.state
        progress = state.progress
        for group in state.optimizer.param_groups:
            group["lr"] = learning_rate(config.optimizer, progress.step, self.total_steps)
        samples = min(config.train.batch_size, self.sampler.epoch_size(progress.epoch) - progress.seen)
        share = self.ranks.share(samples)  # the batch at hand is this rank's part of the samples
        with naming_train_deterministic():
            out = self.gradients(batch, share)
        if progress.step == 0:
            check_all_used(state.trainable)
        with part("optimizer"):
            self.update(out, samples, share)
        progress.step += 1
        if state.average is not None:
            state.average.update(progress.step)
        progress.seen += samples
        means = self.log_step() if progress.step % config.log.every_steps == 0 else {}
        self.log.advance(samples, {name: means[name] for name in ("loss", *self.objective.SHOWN)} if means else None)
        info = StepInfo(progress.step, self.total_steps, progress.epoch, means)
        self.asked = asks_to_stop(self.callbacks.on_step, info)

    def halt(self, stop: list[int]) -> int:
        """The number of the signal that came, ASKED where a callback asks to stop, or 0; the same on every rank."""
        return self.ranks.largest(stop[0] if stop else ASKED if self.asked else 0)

    def gradients(self, batch: dict[str, Any], share: Share) -> ObjectiveOutput:
        """Forward and backward pass: the gradient of the whole batch, of which `batch` is this rank's share."""
        options = self.config.train
        return forward_backward(
            self.clip,
            batch,
            lambda current: self.loss(current, batch, self.data.train, share),
            micro_batch_size=options.micro_batch_size,
            precision=options.precision,
            # gradients are averaged over the ranks, but those of shares add up
            scale=lambda loss: self.state.scaler.scale(loss * self.ranks.world),
            encode=self.parallel,
            no_sync=self.parallel.no_sync if self.parallel else nullcontext,
        )

    def update(self, out: ObjectiveOutput, samples: int, share: Share) -> None:
        """Move the weights along the gradient, unless it is not finite."""
        state = self.state
        state.scaler.unscale_(state.optimizer)
        norm = whole(nn.utils.get_total_norm([p.grad for p in state.trainable.values() if p.grad is not None]))
        if clip := self.config.optimizer.clip_norm:
            nn.utils.clip_grads_with_norm_(state.trainable.values(), clip, norm)
        finite = self.ranks.sum(out.loss).isfinite()
        if not state.scaler.is_enabled():  # else it skips and lowers the scale, as a matter of course
            finite &= norm.isfinite()
            leave_out(state.optimizer, finite)
        state.scaler.step(state.optimizer)
        state.scaler.update()
        state.optimizer.zero_grad(set_to_none=True)
        progress = state.progress
        self.watch.note(Step(progress.step + 1, progress.epoch, progress.seen, samples), finite)
        # a share over its fraction is this rank's estimate; their mean over all rows is the batch's value
        estimates = {name: value / share.fraction for name, value in {"loss": out.loss, **out.terms}.items()}
        state.meter.add(estimates, samples if share.whole else share.counts[share.rank], finite)

    def loss(
        self, current: QuadrupletEmbeddings, batch: dict[str, Any], split: Split, share: Share = ALONE
    ) -> ObjectiveOutput:
        """The objective of one batch's embeddings against the cached frozen outputs."""
        index, bank = batch["index"], split.bank
        # rounds nothing: the frozen rows were made in the same precision
        frozen = QuadrupletEmbeddings(
            *(x.to(y.dtype) for x, y in zip(split.frozen_of(index, self.device), current, strict=True))
        )
        neighbors = split.neighbors_of(index, self.device)
        if neighbors is None and self.objective.needs_neighbors:
            options = self.config.objective
            neighbors = bank.nearest(frozen.unsafe_text, options.k, backend=options.backend, check=False)
        if neighbors is not None:
            bank, neighbors = bank.gather(neighbors)
        return self.objective(
            current,
            frozen,
            bank,
            neighbors,
            batch["unsafe_text_label"].to(self.device, non_blocking=True) if split.mixed else None,
            batch["unsafe_image_label"].to(self.device, non_blocking=True) if split.mixed else None,
            share,
        )

    def log_step(self) -> dict[str, float]:
        self.check_watch()
        means, progress = self.state.meter.means(self.ranks), self.state.progress
        check_finite(means, progress.step)
        now = time.perf_counter()
        rate, self.clock, self.logged = (progress.step - self.logged) / (now - self.clock), now, progress.step
        lr = self.state.optimizer.param_groups[0]["lr"]
        speed = {"samples_per_second": rate * self.config.train.batch_size}
        self.log.write("train", progress.step, means, epoch=progress.epoch, lr=lr, **speed)
        return means

    def check_watch(self) -> None:
        """Name the steps that were not finite; raise FloatingPointError unless they may be left out."""
        for step in self.watch.failed():
            report(step, self.sampler, self.data.train.samples, self.config.train.on_nan, self.ranks.first)

    def end_epoch(self) -> None:
        """Validate if it is time, move to the next epoch, save."""
        config, progress = self.config, self.state.progress
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
        progress = self.state.progress
        check_finite(means, progress.step)
        self.log.write("val", progress.step, means, epoch=progress.epoch)
        metric = self.config.validation.metric
        score = means["loss"] if metric == "loss" else -means[metric]
        best = progress.best_score is None or score < progress.best_score
        if best:
            progress.best_score, progress.best_step, progress.stale = score, progress.step, 0
            tensors = gathered(self.state.trained_tensors(), self.ranks.first)
            if self.ranks.first:
                save_checked(self.best_file, tensors, {"step": progress.step})
        else:
            progress.stale += 1
            progress.finished = progress.finished or 0 < self.config.validation.patience <= progress.stale
        info = ValidationInfo(progress.step, progress.epoch, means, best)
        self.asked = asks_to_stop(self.callbacks.on_validation, info) or self.asked
        progress.finished = progress.finished or self.asked

    def averaged(self) -> AbstractContextManager:
        """The model holds the averaged weights inside, if train.ema asks for an average."""
        average = self.state.average
        return nullcontext() if average is None else average.applied()

    @torch.no_grad()
    def validate(self, split: Split) -> dict[str, float]:
        """Means of the loss and its terms over `split`, whose batches are dealt out to the ranks whole; its recalls."""
        self.clip.eval()
        options, meter = self.config.train, Meter()
        batches = list(BatchSampler(range(len(split.samples)), options.batch_size, drop_last=False))
        mine = batches[self.ranks.rank :: self.ranks.world]
        # sliced weights (train.fsdp) need every rank for every batch
        spare = batches[:1] * (math.ceil(len(batches) / self.ranks.world) - len(mine))
        rows, captions = [], []
        for number, batch in enumerate(self.loader(split, mine + spare)):
            current = embed_micro_batches(self.clip, batch, options.micro_batch_size, options.precision)
            out = self.loss(current, batch, split)
            kept = len(batch["index"]) if number < len(mine) else 0  # none where a rank has no batch of its own
            meter.add({"loss": out.loss, **out.terms}, kept)
            rows.append(QuadrupletEmbeddings(*(side[:kept] for side in current)))
            captions.append([self.clip.padded(batch[f"{side}_tokens"][:kept]) for side in ("safe", "unsafe")])
        return meter.means(self.ranks) | recalls(rows, captions, self.ranks)

    def loader(self, split: Split, batches: RankBatches | list[list[int]]) -> DataLoader:
        workers = self.config.data.num_workers
        return DataLoader(
            split.samples,
            batch_sampler=batches,
            collate_fn=collate(self.clip.tokenizer),
            num_workers=workers,
            pin_memory=self.device.type == "cuda",
            persistent_workers=workers > 0 and isinstance(batches, RankBatches),
            worker_init_fn=ignore_stop_signals,
            generator=torch.Generator(),  # leaves the global generator alone
        )

    def save(self) -> None:
        """Write a checkpoint of everything that the next step depends on."""
        self.check_watch()
        self.state.progress.log_bytes = self.log.sync()
        save_run(self.state)

    def stopped(self, number: int) -> TrainResult:
        self.save()
        self.log.close()
        if self.ranks.first:
            name = signal.Signals(number).name
            print(f"{name}: saved step {self.state.progress.step}; go on with resume=auto", flush=True)
        return TrainResult(None, self.state.progress, number)

    def export(self) -> Path:
        """Write the final weights, of the best validation or the last step, for open_clip."""
        folder = self.run_dir / "final"
        if not (self.ranks.first or self.config.train.fsdp):
            return folder / WEIGHTS_NAME
        best = self.config.validation.final == "best" and self.state.progress.best_score is not None
        if best:
            self.state.load_trained(load_checked(self.best_file).tensors)  # averaged ones, where there is an average
        with nullcontext() if best else self.averaged():
            weights = gathered(self.clip.exported_state_dict(), self.ranks.first)
        if self.ranks.first:
            if self.state.frozen is not None:
                write_record(folder, self.state.frozen)  # first: final/ counts once its weights are there
            self.clip.export(folder, weights)
        return folder / WEIGHTS_NAME


def train(config: Config, callbacks: Callbacks = Callbacks()) -> TrainResult:  # noqa: B008 - it is immutable
    """Fine-tune as `config` says; results go to `config.run_dir`, and news to the `callbacks`.

    Writes config.yaml, log.jsonl, tensorboard/, checkpoints/, best.safetensors and final/ (for open_clip), and
    frozen/ where training starts from random weights.

    Raises:
        ConfigError, ValueError, FileNotFoundError: options, model or data that do not fit; the message has the remedy.
        InUseError: another process trains in, evaluates or exports to this run_dir.
        CheckpointError: a used run_dir without resume=auto, or a checkpoint of another run.
        FrozenModelError: another frozen model than the checkpoint's or model.weights_hash's.
        FloatingPointError: the loss is not finite.
        OSError: a file could not be written.
    """
    run_dir = Path(config.run_dir)
    check_fsdp(config)
    try:
        with ranks() as members, stop_at_once(), claim(run_dir) if members.first else nullcontext():
            check_unused(config)
            check_inputs(config)
            return _trainer(config, members, callbacks).fit()
    except Stopped as stop:  # not in a step: Trainer.fit handles those
        print(f"{stop}: stopped at once; the same command goes on, with resume=auto if steps are done", flush=True)
        return TrainResult(None, Progress(), stop.number)


def _trainer(config: Config, members: Ranks, callbacks: Callbacks) -> Trainer:
    """The run that `config` describes, on one of its ranks, where the last checkpoint left it."""
    run_dir = Path(config.run_dir)
    device = set_up_torch(config)
    if config.train.precision == "auto":
        config = replace(config, train=replace(config.train, precision=native_precision(device)))
    clip, frozen = open_for_training(config, device)
    config = replace(config, model=replace(config.model, weights_hash=frozen.weights_hash))
    trial_step(config, clip, members.world)
    data = prepare(config, clip, members)
    if members.first:
        keep_random_weights(config, clip)
    torch.manual_seed(config.seed)  # the same adapters whether the caches were warm or not
    set_trainable(config, clip)
    if config.data.text_only and members.first:
        print(SAID, flush=True)
    if config.train.checkpointing:
        clip.model.set_grad_checkpointing()
    if config.train.compile:
        compile_encoders(clip)
    if not members.first:
        torch.manual_seed(config.seed + 1_000_003 * members.rank)  # dropout of its own
    trainer = Trainer(config, clip, data, members, frozen, callbacks)
    if members.first:
        for folder in (run_dir, run_dir / "final", run_dir / "frozen"):
            remove_leftovers(folder)
    if config.resume == "auto":
        restore_run(trainer.state)
    if members.first:
        with atomic_write(run_dir / "config.yaml") as file:
            OmegaConf.save(OmegaConf.structured(config), file)
    return trainer
