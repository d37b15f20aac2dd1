"""Kill -9 at any moment, resume, and get the weights and the log of an undisturbed run, bit for bit."""

import os
import random
import signal
import time
import warnings
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

import saferclip_fast.embeddings
import saferclip_fast.storage.files
import saferclip_fast.train.checkpoint
import saferclip_fast.train.runlog
from saferclip_fast.runtime.ranks import Ranks
from saferclip_fast.train import Trainer, train
from saferclip_fast.train.checkpoint import read_checkpoint
from saferclip_fast.train.resume import restore_rank
from saferclip_fast.train.runlog import Meter
from tests.train.conftest import PROCESSES, final_weights, log_lines, run_child, train_child


def assert_same_run(run_dir, undisturbed):
    assert final_weights(run_dir) == final_weights(undisturbed)
    assert log_lines(run_dir) == log_lines(undisturbed)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def die_in_checkpoint_bytes(config, count):
    """Killed with half of the checkpoint's bytes written, in the count-th checkpoint."""
    write = saferclip_fast.storage.files.save_file
    calls = []

    def half(tensors, path, metadata):
        write(tensors, path, metadata)
        calls.append(path)
        if len(calls) == count:
            os.truncate(path, path.stat().st_size // 2)
            die()

    saferclip_fast.storage.files.save_file = half
    train(config)


def die_before_rename(config, count):
    """Killed when the temporary file is whole but does not have its name yet."""
    sync = saferclip_fast.storage.files.sync
    calls = []

    def synced(path):
        sync(path)
        calls.extend([path] if path.name.startswith(".step-") else [])
        if len(calls) == count:
            die()

    saferclip_fast.storage.files.sync = synced
    train(config)


def die_before_old_one_is_deleted(config, count):
    """Killed when the new checkpoint has its name and the old ones are still there."""
    write = saferclip_fast.train.checkpoint.save_tensors
    calls = []

    def written(*arguments):
        write(*arguments)
        calls.append(arguments)
        if len(calls) == count:
            die()

    saferclip_fast.train.checkpoint.save_tensors = written
    train(config)


def die_in_log_line(config, count):
    """Killed with half a line in the log."""
    write = saferclip_fast.train.runlog.RunLog.write
    calls = []

    def torn(self, *arguments, **extra):
        calls.append(arguments)
        if len(calls) == count:
            self.file.write(b'{"kind": "train", "st')
            self.file.flush()
            die()
        write(self, *arguments, **extra)

    saferclip_fast.train.runlog.RunLog.write = torn
    train(config)


def die_in_step(config, count):
    """Killed with the gradients computed and the weights not yet changed."""
    compute, calls = saferclip_fast.train.trainer.forward_backward, []

    def computed(*arguments, **options):
        out = compute(*arguments, **options)
        calls.append(out)
        if len(calls) == count + 1:
            die()
        return out

    saferclip_fast.train.trainer.forward_backward = computed
    train(config)


def die_between_best_and_checkpoint(config, count):
    """Killed when the best weights are new and the checkpoint is from before."""
    end_epoch, save = Trainer.end_epoch, Trainer.save

    def ended(self):
        if self.state.progress.epoch == count:
            Trainer.save = lambda self: die()
        end_epoch(self)
        Trainer.save = save

    Trainer.end_epoch = ended
    train(config)


@pytest.mark.parametrize(
    ("death", "count"),
    [
        (die_in_checkpoint_bytes, 1),
        (die_in_checkpoint_bytes, 5),
        (die_before_rename, 3),
        (die_before_old_one_is_deleted, 4),
        (die_in_log_line, 3),
        (die_in_log_line, 7),
        (die_in_step, 0),
        (die_in_step, 11),  # between two log lines
        (die_in_step, 13),
        (die_between_best_and_checkpoint, 2),
    ],
)
def test_killed_at_a_chosen_moment(tiny, tmp_path, undisturbed, death, count):
    config = tiny(tmp_path / "run", "resume=auto")
    assert run_child(death, config, count) == -signal.SIGKILL
    for path in (tmp_path / "run" / "checkpoints").glob("step-*"):
        read_checkpoint(path)  # whole
    assert run_child(train_child, config) == 0
    assert_same_run(tmp_path / "run", undisturbed)
    assert not list((tmp_path / "run").rglob("*.tmp")), "a killed writer's file was left behind"


def test_killed_again_and_again_at_random_times(tiny, tmp_path, undisturbed):
    config = tiny(tmp_path / "run", "resume=auto")
    log = tmp_path / "run" / "log.jsonl"
    chance = random.Random(3)
    for _ in range(4):
        process = PROCESSES.Process(target=train_child, args=(config,))
        process.start()
        while process.is_alive() and not log.exists():
            time.sleep(0.005)
        time.sleep(chance.uniform(0.05, 0.4))
        process.kill()
        process.join()
    assert run_child(train_child, config) == 0
    assert_same_run(tmp_path / "run", undisturbed)


def test_sigterm_saves_and_resumes(tiny, tmp_path, undisturbed):
    config = tiny(tmp_path / "run", "resume=auto", "checkpoint.every_steps=1000")
    process = PROCESSES.Process(target=train_child, args=(config,))
    process.start()
    log = tmp_path / "run" / "log.jsonl"
    while process.is_alive() and not (log.exists() and log.stat().st_size):
        time.sleep(0.002)
    process.terminate()
    process.join(300)
    assert process.exitcode == 10
    assert len(list((tmp_path / "run" / "checkpoints").glob("*.safetensors"))) >= 1
    assert run_child(train_child, config) == 0
    assert_same_run(tmp_path / "run", undisturbed)


def prepare_slowly(config):
    """Body of a child process whose frozen embeddings take a while."""
    compute = saferclip_fast.embeddings.embed_batch
    saferclip_fast.embeddings.embed_batch = lambda *arguments: time.sleep(0.3) or compute(*arguments)
    train_child(config)


def test_sigterm_while_preparing_stops_at_once_and_loses_nothing(tiny, tmp_path):
    words = ("train.embed_batch_size=4", "train.epochs=1")
    config = tiny(tmp_path / "run", f"data.cache_dir={tmp_path / 'cache'}", *words)
    process = PROCESSES.Process(target=prepare_slowly, args=(config,))
    process.start()
    while process.is_alive() and not list(tmp_path.glob("cache/*.partial")):
        time.sleep(0.005)
    began = time.monotonic()
    process.terminate()
    process.join(300)
    assert process.exitcode == 10 and time.monotonic() - began < 2
    assert list(tmp_path.glob("cache/*.partial")) and not (tmp_path / "run" / "log.jsonl").exists()
    assert run_child(train_child, config) == 0, "the same command goes on"
    train(tiny(tmp_path / "undisturbed", f"data.cache_dir={tmp_path / 'other'}", *words))
    assert_same_run(tmp_path / "run", tmp_path / "undisturbed")


def test_finished_run_resumes_to_the_same_weights(tiny, tmp_path, undisturbed):
    run_dir = tmp_path / "run"
    train(tiny(run_dir))
    (run_dir / "final" / "open_clip_model.safetensors").unlink()
    train(tiny(run_dir, "resume=auto"))
    assert_same_run(run_dir, undisturbed)


def test_truncated_checkpoint_falls_back_to_the_one_before(tiny, tmp_path, undisturbed):
    run_dir = tmp_path / "run"
    assert run_child(die_in_step, tiny(run_dir), 13) == -signal.SIGKILL
    newest = sorted((run_dir / "checkpoints").glob("*.safetensors"))[-1]
    os.truncate(newest, newest.stat().st_size - 100)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train(tiny(run_dir, "resume=auto"))
    told = "\n".join(str(w.message) for w in caught)
    assert f"checkpoint {newest} is damaged" in told
    assert "going on from" in told and "step-0000000010.safetensors" in told
    assert_same_run(run_dir, undisturbed)


def test_loader_processes_do_not_change_the_result(tiny, tmp_path, undisturbed):
    run_dir = tmp_path / "run"
    train(tiny(run_dir, "data.num_workers=2"))
    assert_same_run(run_dir, undisturbed)


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_other_ranks_than_before_share_the_sums_and_say_so(rank):
    """Two ranks saved, three go on: the first takes what the two had summed, and no rank takes another's dropout."""
    run = SimpleNamespace(ranks=Ranks(rank, 3), meter=Meter(), device=torch.device("cpu"))
    saved = {"meter.total": torch.tensor([[1.0, 2.0], [10.0, 20.0]]), "rng.torch": torch.zeros(2, 8, dtype=torch.uint8)}
    before = torch.get_rng_state()
    with pytest.warns(UserWarning, match="2 ranks before, 3 now") if rank == 0 else nullcontext():
        restore_rank(run, saved, 2)
    assert run.meter.total.tolist() == ([11, 22] if rank == 0 else [0, 0])
    assert torch.equal(torch.get_rng_state(), before)
