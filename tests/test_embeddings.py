"""Frozen embeddings: the right rows, computed once, resumed after a kill, never taken for others."""

import json
import os
import signal
from pathlib import Path

import pytest
import torch

import saferclip_fast.embeddings as embeddings
import saferclip_fast.storage.row_cache as row_cache
from saferclip_fast.data import ToTensor, collate, open_quadruplets
from saferclip_fast.embeddings import embed_batch, embed_quadruplets, load_embeddings
from saferclip_fast.models import load_clip
from saferclip_fast.storage.row_file import RowFile
from tests.train.conftest import run_child

SOURCE = "scenes:n=23,size=32"


@pytest.fixture
def clip(weights):
    return load_clip("ViT-tiny-8-32", str(weights))


@pytest.fixture
def dataset(clip):
    return open_quadruplets(SOURCE, transform=clip.preprocess)


def embed(clip, dataset, folder, **options):
    return embed_quadruplets(clip, dataset, folder, batch_size=4, progress=False, **options)


def assert_same_rows(found, clip, dataset):
    batch = collate(clip.tokenizer)([dataset[i] for i in range(len(dataset))])
    with clip.frozen():
        expected = embed_batch(clip, batch)
    for rows, wanted in zip(found.embeddings, expected, strict=True):
        assert rows.dtype == torch.float32
        torch.testing.assert_close(rows, wanted)


def test_rows_are_the_frozen_models(clip, dataset, tmp_path):
    clip.add_lora(rank=2)
    for p in clip.parameters():
        if p.requires_grad:
            torch.nn.init.normal_(p)  # adapters far from zero: only a frozen pass gives the right rows
    found = embed(clip, dataset, tmp_path)
    assert_same_rows(found, load_clip(clip.name, clip_file(clip, tmp_path)), dataset)
    assert found.metadata["model"] == "ViT-tiny-8-32"
    assert found.metadata["weights_hash"] == clip.weights_hash
    assert found.metadata["data_hash"] == dataset.content_hash()
    assert json.loads(found.metadata["preprocessing"])["size"] == [32, 32]


def clip_file(clip, folder):
    """The frozen weights of `clip` in a file of their own."""
    for layer in embeddings_layers(clip):
        torch.nn.init.zeros_(layer.lora_B["default"].weight)
    return str(clip.export(folder / "frozen"))


def embeddings_layers(clip):
    from saferclip_fast.models.lora import lora_layers

    return lora_layers(clip.model).values()


def test_second_call_reads_the_file(clip, dataset, tmp_path, monkeypatch):
    first = embed(clip, dataset, tmp_path)
    monkeypatch.setattr(embeddings, "embed_batch", None)
    second = embed(clip, dataset, tmp_path)
    assert second.path == first.path
    assert all(torch.equal(a, b) for a, b in zip(first.embeddings, second.embeddings, strict=True))


def test_rows_are_mapped_not_read(clip, dataset, tmp_path):
    found = embed(clip, dataset, tmp_path)
    assert str(found.path) in Path("/proc/self/maps").read_text()


def embed_and_die(weights, folder, batches):
    """Body of a child process: killed in the middle of writing a batch, after `batches` whole ones."""
    row_cache._SYNC_BYTES = 8 * 4 * 64 * 4  # 8 rows of four embeddings
    clip = load_clip("ViT-tiny-8-32", str(weights))
    write, calls = RowFile.write, []

    def written(self, name, first, rows):
        calls.append(first)
        torn = len(calls) == 4 * batches + 4  # the last of the batch's four tensors
        size = write(self, name, first, torch.full_like(rows, 7.0) if torn else rows)
        if torn:
            os.kill(os.getpid(), signal.SIGKILL)
        return size

    RowFile.write = written
    embed(clip, open_quadruplets(SOURCE, transform=clip.preprocess), folder)


@pytest.mark.parametrize(("batches", "kept"), [(0, 0), (1, 0), (2, 8), (5, 16)])
def test_killed_run_goes_on_without_losing_or_doubling_rows(
    clip, dataset, weights, tmp_path, monkeypatch, batches, kept
):
    assert run_child(embed_and_die, weights, tmp_path, batches) == -signal.SIGKILL
    assert not list(tmp_path.glob("embeddings-*.safetensors")), "a partial file does not pass for a whole one"
    seen = []
    compute = embeddings.embed_batch

    def counted(clip, batch, precision="fp32"):
        seen.extend(batch["index"].tolist())
        return compute(clip, batch, precision)

    monkeypatch.setattr(embeddings, "embed_batch", counted)
    found = embed(clip, dataset, tmp_path)
    assert seen == list(range(kept, 23)), "rows already on disk are not computed again"
    assert_same_rows(found, clip, dataset)
    assert not list(tmp_path.glob("*.partial")) and not list(tmp_path.glob("*.progress*"))


def test_anything_that_changes_the_rows_changes_the_file(clip, dataset, tmp_path, weights):
    paths = {embed(clip, dataset, tmp_path).path}
    paths.add(embed(clip, dataset, tmp_path, precision="bf16").path)
    paths.add(embed(clip, open_quadruplets(SOURCE + ",seed=1", transform=clip.preprocess), tmp_path).path)
    for _ in range(2):  # two objects, one transform
        paths.add(embed(clip, open_quadruplets(SOURCE, transform=ToTensor()), tmp_path).path)
    other = load_clip("ViT-tiny-8-32", str(weights))
    with torch.no_grad():
        other.model.ln_final.bias += 0.1
    file = other.export(tmp_path / "other")
    paths.add(embed(load_clip("ViT-tiny-8-32", str(file)), dataset, tmp_path).path)
    assert len(paths) == 5


def test_mismatch_and_damage_are_clear_errors(clip, dataset, tmp_path):
    path = embed(clip, dataset, tmp_path).path
    with pytest.raises(ValueError, match=r"was made with weights_hash='.*', but weights_hash='x' is in use; delete"):
        load_embeddings(path, {"weights_hash": "x"})
    whole = path.read_bytes()
    rows = len(load_embeddings(path).embeddings.safe_text)
    path.write_bytes(whole.replace(f'"rows": "{rows}"'.encode(), f'"rows": "{rows + 1}"'.encode(), 1))
    with pytest.raises(ValueError, match=rf"is damaged \(safe_text has not {rows + 1} rows\); delete it"):
        load_embeddings(path)
    path.write_bytes(whole)
    os.truncate(path, path.stat().st_size - 8)
    with pytest.raises(ValueError, match=r"is damaged .*; delete it to make it again"):
        load_embeddings(path)
    with pytest.raises(FileNotFoundError, match=r"no embeddings at .*embed_quadruplets makes them"):
        load_embeddings(tmp_path / "none.safetensors")


def test_full_disk_is_reported_before_the_work(clip, dataset, tmp_path, monkeypatch):
    def full(descriptor, offset, length):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match=r"no room for 0\.00 GB in .* \(No space left on device\)"):
        embed(clip, dataset, tmp_path)
    assert not list(tmp_path.glob("*.partial"))
