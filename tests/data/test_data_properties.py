"""Properties that hold whatever the content, of everything public in saferclip_fast.data."""

from __future__ import annotations

import csv
import io
import json
import math
import tempfile
from pathlib import Path

import numpy as np
import open_clip
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from saferclip_fast import data
from tests.support.quadruplet_files import image_bytes, write_tar

FEW = settings(max_examples=25)
ON_DISK = settings(max_examples=8)
FIELDS = ("safe_image", "unsafe_image", "safe_text", "unsafe_text", "unsafe_text_label", "unsafe_image_label")
seeds, labels = st.integers(0, 2**31), st.integers(0, 1)
# no lone surrogates, which are no text, and no NUL, which Python 3.10's csv cannot read
captions = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=20).map(str.strip)
texts = captions.filter(bool)


def array(seed: int, height: int, width: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


@st.composite
def datasets(draw, same_size: bool = False) -> data.QuadrupletDataset:
    """One to six samples in memory."""
    sizes = st.tuples(st.integers(1, 9), st.integers(1, 9))
    size = st.just(draw(sizes)) if same_size else sizes

    def image() -> data.ImageArray:
        return data.ImageArray(array(draw(seeds), *draw(size)))

    rows = range(draw(st.integers(1, 6)))
    return data.QuadrupletDataset(
        [data.Quadruplet(image(), draw(texts), image(), draw(texts), draw(labels), draw(labels)) for _ in rows]
    )


def assert_same_items(found, wanted):
    assert len(found) == len(wanted)
    for mine, its in zip(found, wanted, strict=True):
        assert mine.keys() == its.keys()
        for key, value in its.items():
            assert torch.equal(mine[key], value) if isinstance(value, torch.Tensor) else mine[key] == value, key


@ON_DISK
@given(datasets(), st.integers(1, 4))
def test_shards_give_back_the_samples_and_are_the_same_each_time(dataset, samples_per_shard):
    with tempfile.TemporaryDirectory() as folder:
        one, other = (
            data.write_shards(dataset, Path(folder, name), samples_per_shard, progress=False) for name in ("a", "b")
        )
        assert len(one) == math.ceil(len(dataset) / samples_per_shard)
        assert [Path(path).read_bytes() for path in one] == [Path(path).read_bytes() for path in other]
        found = data.open_quadruplets(Path(folder, "a"))
        assert isinstance(found.records[0].safe_image, data.TarMember)
        assert_same_items(found, dataset)


@ON_DISK
@given(datasets(same_size=True))
def test_decoded_images_are_the_same_items_and_made_once(dataset):
    with tempfile.TemporaryDirectory() as cache:
        first, second = (data.decode_images(dataset, cache, progress=False) for _ in range(2))
        assert len(list(Path(cache).glob("decoded-*.safetensors"))) == 1
        assert_same_items(first, dataset)
        assert_same_items(second, dataset)
        assert first.content_hash() == dataset.content_hash()


def as_csv(rows, delimiter=","):
    buffer = io.StringIO(newline="")
    writer = csv.writer(buffer, delimiter=delimiter)
    writer.writerows([FIELDS, *rows])
    return buffer.getvalue().encode()


def as_parquet(rows):
    buffer = io.BytesIO()
    columns = zip(*rows, strict=True)
    pq.write_table(pa.table(dict(zip(FIELDS, columns, strict=True))), buffer)
    return buffer.getvalue()


TABLES = {
    ".csv": as_csv,
    ".tsv": lambda rows: as_csv(rows, "\t"),
    ".jsonl": lambda rows: "\n".join(json.dumps(dict(zip(FIELDS, row, strict=True))) for row in rows).encode(),
    ".parquet": as_parquet,
}


@pytest.mark.parametrize("suffix", TABLES)
@ON_DISK
@given(st.lists(st.tuples(captions, captions, labels, labels), min_size=1, max_size=6))
def test_a_table_gives_back_its_good_rows_in_order_and_counts_the_others(suffix, rows):
    good = [row for row in rows if row[0] and row[1]]
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "a.png").write_bytes(image_bytes(0))
        table = Path(folder, f"table{suffix}")
        table.write_bytes(TABLES[suffix]([("a.png", "a.png", *row) for row in rows]))
        if not good:
            with pytest.raises(data.DataError, match="no usable quadruplet"):
                data.open_quadruplets(table, on_error="skip", progress=False)
            return
        found = data.open_quadruplets(table, on_error="skip", progress=False)
        assert [tuple(item[field] for field in FIELDS[2:]) for item in found] == good
        assert isinstance(found.records[0].safe_image, data.ImageFile)
        summary: data.Summary = found.summary
        assert (summary.read, summary.kept, summary.skipped) == (len(rows), len(good), len(rows) - len(good))
        if len(good) < len(rows):
            with pytest.raises(data.DataError, match=r"row \d+: .* is empty"):
                data.open_quadruplets(table)


@FEW
@given(seeds, st.integers(1, 9), st.integers(1, 9))
def test_to_tensor_keeps_every_pixel(seed, height, width):
    pixels = array(seed, height, width)
    tensor = data.ToTensor()(data.ImageArray(pixels).load())
    assert tensor.dtype == torch.float32 and tensor.shape == (3, height, width)
    assert tensor.min() >= 0 and tensor.max() <= 1
    assert np.array_equal((tensor * 255).round().byte().permute(1, 2, 0).numpy(), pixels)


@pytest.fixture(scope="module")
def tokenizer():
    return open_clip.get_tokenizer("ViT-B-32")  # its words come with open_clip


@FEW
@given(rows=st.lists(st.tuples(captions, captions, labels, labels), min_size=1, max_size=6))
def test_trimmed_captions_are_the_whole_ones_without_padding(rows, tokenizer):
    image = torch.zeros(3, 1, 1)
    samples = [
        {"index": i, "safe_image": image, "unsafe_image": image, **dict(zip(FIELDS[2:], row, strict=True))}
        for i, row in enumerate(rows)
    ]
    trimmed, whole = data.collate(tokenizer)(samples), data.Collate(tokenizer, trim=False)(samples)
    for side in ("safe", "unsafe"):
        tokens, all_tokens = trimmed[f"{side}_tokens"], whole[f"{side}_tokens"]
        width = tokens.shape[1]
        assert torch.equal(tokens, all_tokens[:, :width]) and not all_tokens[:, width:].any()
        assert max(trimmed[f"{side}_lengths"]) == width
        for row, length in zip(tokens, trimmed[f"{side}_lengths"], strict=True):
            assert row[length - 1] != 0 and not row[length:].any()
    assert trimmed["unsafe_text_label"].tolist() == [row[2] for row in rows]


similarities = st.lists(st.floats(-1, 1), min_size=1, max_size=40)


@FEW
@given(similarities, seeds, st.lists(st.floats(0.01, 1), min_size=1, max_size=4), st.data())
def test_an_epoch_holds_the_easiest_share_once_each_and_goes_on_anywhere(values, seed, stages, draw):
    sampler = data.CurriculumSampler(values, seed, stages)
    epoch = draw.draw(st.integers(1, 6))
    sampler.set_epoch(epoch)
    found = list(sampler)
    share = stages[min(epoch, len(stages)) - 1]
    assert abs(len(found) - share * len(values)) <= 1 and len(set(found)) == len(found) == len(sampler)
    left_out = [values[i] for i in set(range(len(values))) - set(found)]
    assert min(values[i] for i in found) >= max(left_out, default=-1)
    start = draw.draw(st.integers(0, len(found)))
    again = data.CurriculumSampler(torch.tensor(values, dtype=torch.float64), seed, stages)
    again.set_epoch(epoch, start)
    assert list(again) == found[start:]


@ON_DISK
@given(st.integers(1, 20), seeds, st.sampled_from(["train", "test"]), st.floats(0, 1), st.floats(0, 1))
def test_scenes_are_those_of_their_seed_and_labels_say_what_is_drawn(n, seed, split, mismatch, mixed):
    options = {"n": n, "seed": seed, "split": split, "size": 16, "mismatch": mismatch, "mixed": mixed}
    one, other = data.SceneDataset(**options), data.SceneDataset(**options)
    assert len(one) == n and one.content_hash() == other.content_hash()
    named = data.open_quadruplets("scenes:" + ",".join(f"{name}={value}" for name, value in options.items()))
    assert named.content_hash() == one.content_hash()
    for i, item in enumerate(one):
        assert (item["unsafe_text"] != one.right_texts[i]) == item["unsafe_text_label"]
        assert np.array_equal(one.unsafe_images[i], one.right_images[i]) != item["unsafe_image_label"]


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    members = {f"train/{name}/{i}.png": image_bytes(i, (32, 32)) for name in ("cat", "ship") for i in range(4)}
    members |= {f"test/{name}/{i}.png": image_bytes(9 + i, (32, 32)) for name in ("cat", "ship") for i in range(4)}
    return str(write_tar(tmp_path_factory.mktemp("photos") / "photos.tar", members))


@ON_DISK
@given(n=st.integers(1, 8), seed=seeds, mismatch=st.floats(0, 1))
def test_photographs_are_those_of_their_seed_and_unsafe_ones_carry_a_sign(n, seed, mismatch, photos):
    one, other = (data.PhotoDataset(photos, n=n, seed=seed, mismatch=mismatch, split="test") for _ in range(2))
    assert len(one) == n and one.content_hash() == other.content_hash()
    for i in range(n):
        assert (one.unsafe_images[i] != one.right_images[i]).any()
        assert one.records[i].unsafe_text != one.right_texts[i]


def test_everything_public_is_here():
    """A name that is exported, but in no test of this file, has no property tested."""
    text = Path(__file__).read_text()
    # tests/system/test_properties.py, test_pipeline_properties.py, test_memory.py; modules, whose data sets are here
    elsewhere = ("ImageError", "QuadrupletEmbeddings", "open_rows", "photos", "scenes")
    for name in data.__all__:
        assert name in elsewhere or f"data.{name}" in text, name
