"""SafeBank: normalization, files, mapping, shards, and what it says about bad input."""

import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

from saferclip_fast import SafeBank, nearest_safe


@pytest.fixture
def bank():
    generator = torch.Generator().manual_seed(0)
    text, image = (5 * torch.randn(37, 24, generator=generator) for _ in range(2))
    return SafeBank(text, image, {"model": "tiny", "weights_hash": "abc"})


def test_rows_have_unit_length(bank):
    for rows in (bank.text, bank.image):
        torch.testing.assert_close(rows.norm(dim=-1), torch.ones(37))
    assert (len(bank), bank.width) == (37, 24)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_save_and_load(bank, tmp_path, dtype):
    made = SafeBank(bank.text.to(dtype), bank.image.to(dtype), bank.metadata).pack()
    made.save(tmp_path / "bank.safetensors")
    loaded = SafeBank.load(tmp_path / "bank.safetensors", expect={"weights_hash": "abc"})
    assert torch.equal(loaded.text, made.text) and torch.equal(loaded.image, made.image)
    assert loaded.metadata == bank.metadata
    assert (loaded.packed is None) == (made.packed is None)
    if made.packed is not None:
        assert torch.equal(loaded.packed, made.packed)
    query = torch.randn(5, 24, dtype=dtype)
    for a, b in zip(nearest_safe(query, loaded, 4), nearest_safe(query, made, 4), strict=True):
        assert torch.equal(a, b)


def test_loaded_rows_are_mapped_not_read(tmp_path):
    """Opening a 100 MB bank must cost far less than its size in private memory."""
    rows = torch.randn(50_000, 256)
    SafeBank(rows, rows).save(tmp_path / "bank.safetensors")
    script = """
import sys
from saferclip_fast import SafeBank
def private():
    fields = dict(line.split(":") for line in open("/proc/self/status"))
    return int(fields["RssAnon"].split()[0])
before = private()
bank = SafeBank.load(sys.argv[1])
assert abs(float(bank.text[49_999].norm()) - 1) < 1e-5
print(private() - before)
"""
    command = [sys.executable, "-c", script, str(tmp_path / "bank.safetensors")]
    grown = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert grown < 20_000, f"{grown} kB of private memory for a mapped file"


def test_shards_cover_the_bank_and_find_the_same(bank):
    query = torch.randn(3, 24)
    whole = nearest_safe(query, bank, 1)
    shards = [bank.shard(rank, 5) for rank in range(5)]
    assert [shard.offset for shard in shards] == [0, 7, 14, 22, 29]
    assert torch.equal(torch.cat([shard.text for shard in shards]), bank.text)
    found = [nearest_safe(query, shard, 1) for shard in shards]
    best = torch.cat([f.scores for f in found], 1).argmax(1)
    index = torch.cat([f.indices + s.offset for f, s in zip(found, shards, strict=True)], 1)
    assert torch.equal(index[torch.arange(3), best], whole.indices[:, 0])
    with pytest.raises(ValueError, match=r"0 <= rank < world <= 37"):
        bank.shard(5, 5)


def test_to_the_same_device_is_the_same_bank(bank):
    assert bank.to("cpu") is bank
    assert bank.to("meta").text.is_meta


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t, v: (t[:0], v[:0]), "the bank is empty"),
        (lambda t, v: (t, v[:-1]), "image has 36 rows but text has 37"),
        (lambda t, v: (t, v.half()), "text is torch.float32 but image is torch.float16"),
        (lambda t, v: (t.index_fill(0, torch.tensor(9), 0.0), v), "text row 9 is all zeros"),
        (lambda t, v: (t, v.index_fill(0, torch.tensor(4), float("nan"))), "image holds NaN or Inf, first in row 4"),
    ],
)
def test_bad_rows(bank, change, message):
    with pytest.raises(ValueError, match=message):
        SafeBank(*change(bank.text, bank.image))


def test_bad_files(bank, tmp_path):
    path = tmp_path / "bank.safetensors"
    with pytest.raises(FileNotFoundError, match="no bank file at"):
        SafeBank.load(path)
    bank.save(path)
    with pytest.raises(ValueError, match=r"made with weights_hash='abc', but weights_hash='xyz' is in use; delete"):
        SafeBank.load(path, expect={"weights_hash": "xyz"})
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(ValueError, match="damaged or not a safetensors file"):
        SafeBank.load(path)
    save_file({"rows": torch.zeros(2, 2)}, path)
    with pytest.raises(ValueError, match="is not a SafeBank file"):
        SafeBank.load(path)


def test_a_failed_save_keeps_the_old_file(bank, tmp_path, monkeypatch):
    path = tmp_path / "bank.safetensors"
    bank.save(path)
    old = path.read_bytes()
    monkeypatch.setattr(
        "saferclip_fast.storage.files.sync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left"))
    )
    with pytest.raises(OSError, match=r"could not write .*No space left.*; the old file, if any, is intact"):
        bank.save(path)
    assert path.read_bytes() == old and [file.name for file in tmp_path.iterdir()] == [path.name]


IN_LITTLE_MEMORY = """
import resource, sys, torch
from pathlib import Path
from safetensors.torch import load_file
import saferclip_fast.bank
from saferclip_fast import SafeBank, nearest_safe

folder = Path(sys.argv[1])
rows = load_file(folder / "embeddings.safetensors")  # mapped
saferclip_fast.bank.safe_bank._NORMALIZE_ROWS = 4096
nearest_safe(rows["text"][:2], SafeBank(rows["text"][:9], rows["image"][:9]))  # warm: what the first call allocates
held = next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith("VmData"))


def leave(bytes_beside_the_rows):
    limit = 1024 * held + bytes_beside_the_rows
    resource.setrlimit(resource.RLIMIT_DATA, (limit, resource.RLIM_INFINITY))


leave(64 * 1024**2)
load, SafeBank.load = SafeBank.load, lambda path: path  # the map of the file counts, though it takes no memory
path = SafeBank.build(folder / "bank.safetensors", rows["text"], rows["image"], torch.arange(1, 100_000), {"m": "n"})
leave(64 * 1024**2 + path.stat().st_size)
bank = load(path)
try:
    SafeBank(bank.text, bank.image)
except (MemoryError, RuntimeError):
    pass
else:
    sys.exit("the limit is no limit")
print(nearest_safe(rows["text"][1:9], bank, 4).indices[:, 0].tolist(), len(bank), bank.metadata)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not enforce RLIMIT_DATA")
def test_bank_larger_than_memory_is_built_and_searched(tmp_path):
    text, image = torch.randn(2, 100_000, 192, generator=torch.Generator().manual_seed(0))  # 77 MB each
    save_file({"text": text, "image": image}, tmp_path / "embeddings.safetensors")
    done = subprocess.run(
        [sys.executable, "-c", IN_LITTLE_MEMORY, tmp_path], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == f"{list(range(8))} 99999 {{'m': 'n'}}"
    assert not list(tmp_path.glob(".*")), "no temporary file is left"


def test_built_bank_is_the_saved_one(tmp_path, monkeypatch):
    monkeypatch.setattr("saferclip_fast.bank.safe_bank._NORMALIZE_ROWS", 7)
    text, image = torch.randn(2, 50, 24, generator=torch.Generator().manual_seed(3))
    rows = torch.arange(0, 50, 3)
    SafeBank(text[rows], image[rows], {"model": "m"}).save(tmp_path / "saved.safetensors")
    SafeBank.build(tmp_path / "built.safetensors", text, image, rows, {"model": "m"})
    saved, built = (SafeBank.load(tmp_path / f"{name}.safetensors") for name in ("saved", "built"))
    assert torch.equal(saved.text, built.text) and torch.equal(saved.image, built.image)
    assert saved.metadata == built.metadata
