"""Checkpoint files: round trip, keep the newest, fall back from damage, survive a full disk."""

import os
import random
import resource
import signal
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

from saferclip_fast.config import Config, flatten, load_config
from saferclip_fast.train.checkpoint import (
    CheckpointError,
    CheckpointFolder,
    check_same_run,
    pack_optimizer,
    read_checkpoint,
    unpack_optimizer,
)
from saferclip_fast.train.rng import pack_rng, unpack_rng
from tests.train.conftest import run_child

TENSORS = {"a": torch.arange(1000.0), "b": torch.tensor(3, dtype=torch.int64)}


def test_round_trip(tmp_path):
    folder = CheckpointFolder(tmp_path, keep=2)
    assert folder.load_newest() is None
    folder.save(7, TENSORS, {"step": 7, "loss": 0.1, "none": None})
    loaded = folder.load_newest()
    assert loaded.state == {"step": 7, "loss": 0.1, "none": None}
    assert all(torch.equal(loaded.tensors[n], t) and loaded.tensors[n].dtype == t.dtype for n, t in TENSORS.items())


def test_keeps_the_newest(tmp_path):
    folder = CheckpointFolder(tmp_path, keep=2)
    for step in (8, 9, 10, 100):
        folder.save(step, TENSORS, {})
    assert [p.name for p in folder.paths()] == ["step-0000000010.safetensors", "step-0000000100.safetensors"]


@pytest.mark.parametrize("size", [0, 4, 100, -1])
def test_damaged_newest_falls_back_with_a_warning(tmp_path, size):
    folder = CheckpointFolder(tmp_path, keep=3)
    good = folder.save(1, TENSORS, {"step": 1})
    bad = folder.save(2, TENSORS, {"step": 2})
    os.truncate(bad, size if size >= 0 else bad.stat().st_size - 1)
    with pytest.warns() as caught:
        assert folder.load_newest().state == {"step": 1}
    told = [str(w.message) for w in caught]
    assert told[0].startswith(f"checkpoint {bad} is damaged: ")
    assert told[1] == f"going on from {good} instead of {bad.name}.damaged"
    assert folder.paths() == [good], "the damaged file does not count as a checkpoint any more"


def test_any_flipped_bit_is_noticed(tmp_path):
    path = CheckpointFolder(tmp_path, keep=3).save(1, TENSORS, {"step": 1, "loss": 0.25})
    whole = path.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    chance = random.Random(0)
    positions = [*range(header), *(chance.randrange(header, len(whole)) for _ in range(64))]
    for position in positions:
        damaged = bytearray(whole)
        damaged[position] ^= 1 << chance.randrange(8)
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=r"damaged|no checkpoint of this version"):
            read_checkpoint(path)
    path.write_bytes(whole)
    assert read_checkpoint(path).state == {"step": 1, "loss": 0.25}


def test_all_damaged_is_an_error(tmp_path):
    folder = CheckpointFolder(tmp_path, keep=3)
    os.truncate(folder.save(1, TENSORS, {}), 50)
    with pytest.warns(), pytest.raises(CheckpointError, match=r"every checkpoint in .* is damaged .*delete the folder"):
        folder.load_newest()


def test_foreign_file_is_an_error(tmp_path):
    save_file(TENSORS, tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match="is no checkpoint of this version"):
        read_checkpoint(tmp_path / "other.safetensors")


def save_on_a_full_disk(folder):
    """Body of a child process whose files may not grow past 2 kB, as on a full disk."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2048, 2048))
    try:
        CheckpointFolder(folder, keep=1).save(2, TENSORS, {"step": 2})
    except OSError as error:
        told = str(error)
        wanted = ("could not write", "step-0000000002.safetensors", "resume=auto goes on from", "step-0000000001.saf")
        sys.exit(0 if all(words in told for words in wanted) else 3)
    sys.exit(4)


def test_full_disk_is_a_clear_error_and_the_old_checkpoint_stays(tmp_path):
    folder = CheckpointFolder(tmp_path, keep=1)
    good = folder.save(1, TENSORS, {"step": 1})
    assert run_child(save_on_a_full_disk, tmp_path) == 0
    assert list(tmp_path.iterdir()) == [good]
    assert folder.load_newest().state == {"step": 1}


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 64 kB, where this process may mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", folder], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("needs the right to mount a tmpfs, as root has")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_real_full_disk_is_a_clear_error_and_the_old_checkpoint_stays(small_disk):
    folder = CheckpointFolder(small_disk, keep=2)
    good = folder.save(1, TENSORS, {"step": 1})
    with pytest.raises(
        OSError, match=r"could not write .*step-0+2\.safe.*make room, then resume=auto goes on from .*step-0+1"
    ):
        folder.save(2, {"a": torch.zeros(100_000)}, {"step": 2})
    assert list(small_disk.iterdir()) == [good]
    assert folder.load_newest().state == {"step": 1}
    assert folder.save(2, TENSORS, {"step": 2}).is_file(), "goes on when there is room"


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW])
def test_optimizer_continues_exactly(kind):
    def run(steps, tensors=None, value=None):
        torch.manual_seed(0)
        parameter = torch.nn.Parameter(torch.randn(5, 3) if value is None else value.clone())
        optimizer = kind([{"params": [parameter]}], lr=0.1, fused=True)
        if tensors is not None:
            unpack_optimizer(optimizer, tensors)
        for step in steps:
            parameter.grad = torch.sin(parameter.detach() * step)
            optimizer.step()
        return parameter.detach(), pack_optimizer(optimizer)

    value, tensors = run(range(1, 4))
    assert set(tensors) == {"optimizer.0.step", "optimizer.0.exp_avg", "optimizer.0.exp_avg_sq"}
    continued, _ = run(range(4, 7), tensors, value)
    assert torch.equal(continued, run(range(1, 7))[0])


def test_random_state_continues_exactly():
    device = torch.device("cpu")
    torch.rand(3)
    state = pack_rng(device)
    expected = torch.rand(5)
    unpack_rng(device, state)
    assert torch.equal(torch.rand(5), expected)


def test_option_younger_than_the_checkpoint_counts_as_its_default(tmp_path):
    then = flatten(Config())
    del then["train.ema"]
    check_same_run(tmp_path, {"config": then}, flatten(Config()), {})
    with pytest.raises(CheckpointError, match=r"train\.ema=0\.9 \(was 0\.0\)"):
        check_same_run(tmp_path, {"config": then}, flatten(load_config(None, ["train.ema=0.9"])), {})


def test_places_and_the_hash_of_weights_may_change_but_not_what_they_are(tmp_path):
    then = {"config": flatten(load_config(None, ["model.pretrained=a"])), "weights_hash": "0" * 64}
    now = flatten(load_config(None, ["model.pretrained=b", f"model.weights_hash={'1' * 64}"]))
    check_same_run(tmp_path, then, now, {"weights_hash": "0" * 64})
    hashes = {"weights_hash": "1" * 64, "preprocessing_hash": "2" * 64}
    for known, told in ((then, ""), (then | {"preprocessing_hash": "3" * 64}, r", preprocessing_hash=2+ \(was 3+\)")):
        said = rf"from another run: model\.pretrained=b \(was a\), weights_hash=1{{12}} \(was 0{{12}}\){told}; use"
        with pytest.raises(CheckpointError, match=said):
            check_same_run(tmp_path, known, now, hashes)
