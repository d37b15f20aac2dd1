"""The targets of fuzzing: each reader of a user's file, some valid files to start from, the errors it may raise."""

from __future__ import annotations

import functools
import gzip
import io
import json
import tempfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from saferclip_fast import BackendError, SafeBank, nearest_safe
from saferclip_fast.config import Config, ConfigError, load_config
from saferclip_fast.data import DataError, open_quadruplets
from saferclip_fast.data.decoded import TENSORS, DecodedFile
from saferclip_fast.data.images import FORMATS, ImageError, decode
from saferclip_fast.data.labeled import CLASS_NAMES_FILE, TEMPLATES_FILE, open_labeled
from saferclip_fast.data.open import parse_options
from saferclip_fast.describe.texts import Texts
from saferclip_fast.describe.word_judge import WordJudge, read_words
from saferclip_fast.embeddings import NAMES, load_embeddings
from saferclip_fast.evaluate.published import missing_of, read_table_data, tables
from saferclip_fast.evaluate.zero_shot import read_templates
from saferclip_fast.gate.folder import described_in
from saferclip_fast.gate.model import GateError
from saferclip_fast.generate.folder import SETTINGS, SIDES, OtherSettingsError, check_settings
from saferclip_fast.generate.judges import read_categories
from saferclip_fast.generate.prompts import hash_prompts, read_prompts
from saferclip_fast.guard.model import Guard, GuardError, Head
from saferclip_fast.label_images import label_table
from saferclip_fast.models import ClipModel, load_clip
from saferclip_fast.models.identity import Identity, differences
from saferclip_fast.report import load_runs, render
from saferclip_fast.results import DIAL_FORMAT, EVALUATION_FORMAT, GATE_FORMAT, UNSAFE_RATE, at
from saferclip_fast.storage.row_file import RowFile
from saferclip_fast.train.checkpoint import CheckpointError, CheckpointFolder
from saferclip_fast.train.frozen import RECORD, FrozenModelError, read_final
from tests.support.quadruplet_files import image_bytes, write_tar
from tests.support.report_files import case, entry, estimate, gate_of, guard_of, restored_of

# One small image that every table may name. Nothing above this folder may be read.
IMAGE = "a.png"


@dataclass(frozen=True)
class Target:
    name: str
    suffix: str
    read: Callable[[Path], object]  # opens the file and uses what it got
    allowed: tuple[type[Exception], ...]
    seeds: Callable[[], list[bytes]]

    def __call__(self, content: bytes) -> None:
        """Reads `content` as a file; an error that is not allowed comes out."""
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / IMAGE).write_bytes(_IMAGE_BYTES)
            path = Path(folder) / f"input{self.suffix}"
            path.write_bytes(content)
            try:
                self.read(path)
            except self.allowed as error:
                # a message for a person, not a bare KeyError's, that any terminal can show
                assert len(str(error).encode()) > 10, repr(error)


_IMAGE_BYTES = image_bytes(0)


def _visu_options(path: Path) -> dict[str, Any]:
    return {"root": path.parent, "unsafe_image": "{name}.png"} if path.suffix == ".json" else {}


def _read_quadruplets(path: Path) -> None:
    options = {"max_pixels": 10_000, "progress": False, "cache_dir": path.parent / "cache"}
    data = open_quadruplets(path, on_error="skip", **options, **_visu_options(path))
    assert data.summary.kept == len(data)
    "".join(data.summary.problems).encode()
    for index in range(len(data)):
        data[index]
    data.content_hash()


def _read_bank(path: Path) -> None:
    bank = SafeBank.load(path)
    # NaN in the file is the caller's data: the search may answer anything, but it may not read out of bounds
    nearest_safe(torch.ones(3, bank.width), bank, min(2, len(bank)), check=False)


def _read_checkpoint(path: Path) -> None:
    folder = path.parent / "checkpoints"
    folder.mkdir()
    path.rename(folder / "step-0000000001.safetensors")
    CheckpointFolder(folder, keep=1).load_newest()


def _read_record(path: Path) -> None:
    folder = path.parent / "final"
    folder.mkdir()
    path.rename(folder / RECORD)
    found = read_final(path.parent, Config())
    assert found is not None
    differences(found, found)


def _record_seeds() -> list[bytes]:
    behavior = {"pixels": [0.5, -1e-3], "image": [float("nan")]}
    return [json.dumps(Identity("0" * 64, {"size": [32, 32]}, "1" * 64, "3.3.0", behavior).as_json()).encode()]


def _read_source(path: Path) -> None:
    options = parse_options(path.read_text("utf-8", "replace"))
    if isinstance(options.get("n"), int) and options["n"] < 100:  # a large data set is slow, not wrong
        open_quadruplets("scenes:" + path.read_text("utf-8", "replace"), progress=False)


def _read_labeled(path: Path) -> None:
    if path.suffix == ".tar":
        (path.parent / CLASS_NAMES_FILE).write_text("cat\ndog\n")
        shard = path
    else:  # the two text files beside shards
        shard = path.with_suffix(".tar")
        shard.write_bytes(_class_shard_seeds()[0])
        (path.parent / CLASS_NAMES_FILE).write_bytes(path.read_bytes())
        (path.parent / TEMPLATES_FILE).write_bytes(path.read_bytes())
    data = open_labeled(str(shard))
    assert all(template.count("{}") == 1 for template in data.templates or ())
    images = data.open(lambda image: image.size)
    for index in range(len(images)):
        images[index]


def _relabel(path: Path) -> None:
    new = path.with_name(f"new{path.suffix}")
    options = {"max_pixels": 10_000, "progress": False, **_visu_options(path)}
    label_table(path, new, lambda images: [0.5] * len(images), **options)
    open_quadruplets(new, on_error="skip", **options)  # what was written can be read


def _read_run(name: str) -> Callable[[Path], None]:
    """Reads the report's input of that name, the other ones being whole."""

    def read(path: Path) -> None:
        (path.parent / "evaluation.json").write_bytes(_evaluation_seeds()[0])
        path.rename(path.with_name(name))
        render(load_runs([path.parent])).encode("utf-8", "replace")

    return read


def _read_table_data(path: Path) -> None:
    """A published table's data sets, and which are missing."""
    given = read_table_data(path)
    for table in tables().values():
        missing_of(table, given)


def _table_data_seeds() -> list[bytes]:
    return [b"visu: {source: v.json, root: coco}\nnudenet: images\n", b'food101: clip_benchmark:food101,root="x"\n']


@functools.cache
def _clip() -> ClipModel:
    torch.manual_seed(0)
    return load_clip("ViT-tiny-8-32")


def _read_guard(path: Path) -> None:
    guard = Guard.read(path, _clip())
    for head in filter(None, (guard.text, guard.image)):
        head(torch.ones(1, head.mean.shape[0]))


def _guard_seeds() -> list[bytes]:
    heads = [
        Head(name, _clip().config["model_cfg"]["embed_dim"], hidden) for name, hidden in (("text", 0), ("image", 3))
    ]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "guard"
        Guard(_clip(), *heads, guard_of()).save(path)
        return [path.read_bytes()]


def _gate_seeds() -> list[bytes]:
    clip = {"name": "a", "weights_hash": "b"}
    found = {"thresholds": {"text": 0.5, "image": 1}, "frozen": clip, "tuned": clip, "guard": {"heads_hash": "c"}}
    return [json.dumps({"format": GATE_FORMAT, **found}).encode()]


def _prompt_seeds() -> list[bytes]:
    return [b'{"prompt": "a dog", "categories": ["x", "y"], "sd_seed": 3}\n{"prompt": "b", "seed": "7"}\n']


def _read_texts(path: Path) -> None:
    """The texts of a description that goes on."""
    folder = path.parent / "out"
    folder.mkdir()
    (folder / SETTINGS).write_text("{}")
    path.rename(folder / f"{SIDES[0]}.jsonl")
    Texts(folder, {}).missing(SIDES[0], ["a.png"])


def _read_settings(path: Path) -> None:
    folder = path.parent / "out"
    folder.mkdir()
    path.rename(folder / SETTINGS)
    check_settings(folder, {"steps": 2}, "images", [])


def _read_cache(path: Path) -> None:
    if b"safe_image_crc32" in path.read_bytes():
        file = DecodedFile(path, {})
        for side in ("safe_image", "unsafe_image"):
            file.image(side, 1)
    else:
        load_embeddings(path).embeddings.safe_text.sum()


def _image_seeds() -> list[bytes]:
    return [image_bytes(1, fmt=name) for name in FORMATS]


def _table_seeds() -> list[bytes]:
    header = b"safe_image,unsafe_image,safe_text,unsafe_text,unsafe_text_label\n"
    return [header + b'a.png,a.png,"a cat, asleep",a hazard,1\n', header + b"../a.png,/etc/hostname,x,y,0\n"]


def _jsonl_seeds() -> list[bytes]:
    row = {"safe_image": IMAGE, "unsafe_image": IMAGE, "safe_text": "a cat", "unsafe_text": "a hazard"}
    return [json.dumps(row).encode() + b"\n", json.dumps(row | {"unsafe_image_label": 0}).encode() + b"\n\n{}"]


def _parquet_seeds() -> list[bytes]:
    fields = ("safe_image", "unsafe_image", "safe_text", "unsafe_text")
    table = pa.table({**{field: [IMAGE, IMAGE] for field in fields}, "unsafe_text_label": [0, 1]})
    seeds = []
    for options in ({}, {"compression": "gzip", "use_dictionary": False}):
        buffer = io.BytesIO()
        pq.write_table(table, buffer, **options)
        seeds.append(buffer.getvalue())
    return seeds


def _held_table() -> pa.Table:
    """Images as `datasets` holds them."""
    image = {"bytes": _IMAGE_BYTES, "path": IMAGE}
    rows = [{"safe_image": image, "unsafe_image": image, "safe_text": f"a cat {i}", "unsafe_text": "b"} for i in (0, 1)]
    return pa.Table.from_pylist(rows)


def _held_seeds() -> list[bytes]:
    buffer = io.BytesIO()
    pq.write_table(_held_table(), buffer)
    return [buffer.getvalue()]


def _saved_seeds() -> list[bytes]:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, _held_table().schema) as writer:
        writer.write_table(_held_table())
    return [sink.getvalue().to_pybytes()]


def _read_saved(path: Path) -> None:
    """A folder of `datasets`."""
    (path.parent / "saved").mkdir()
    path.rename(path.parent / "saved" / "data.arrow")
    (path.parent / "saved" / "state.json").write_text(json.dumps({"_data_files": [{"filename": "data.arrow"}]}))
    _read_quadruplets(path.parent / "saved")


def _read_state(path: Path) -> None:
    (path.parent / "saved").mkdir()
    (path.parent / "saved" / "data.arrow").write_bytes(_saved_seeds()[0])
    path.rename(path.parent / "saved" / "state.json")
    _read_quadruplets(path.parent / "saved")


def _visu_seeds() -> list[bytes]:
    entry = {"safe": "a cat", "nsfw": "a hazard", "coco_id": 9, "nsfw_im_path": IMAGE}
    nsfwcaps = {"caption": "a cat", "nsfw_caption": "a hazard", "image_coco_url": f"http://host/{IMAGE}"}
    return [json.dumps(file).encode() for file in ({"1": entry}, {"info": {}, "data": [entry]}, [nsfwcaps])]


def _shard_seeds() -> list[bytes]:
    texts = json.dumps({"safe_text": "a cat", "unsafe_text": "a hazard"}).encode()
    members = {"0.safe_image.png": _IMAGE_BYTES, "0.unsafe_image.png": _IMAGE_BYTES, "0.json": texts}
    with tempfile.TemporaryDirectory() as folder:
        return [write_tar(Path(folder) / "s.tar", members).read_bytes()]


def _class_shard_seeds() -> list[bytes]:
    with tempfile.TemporaryDirectory() as folder:
        members = {"0.png": _IMAGE_BYTES, "0.cls": b"1", "1.png": _IMAGE_BYTES, "1.cls": b"0"}
        return [write_tar(Path(folder) / "s.tar", members).read_bytes()]


def _evaluation_seeds() -> list[bytes]:
    metrics = {
        name: entry(name, "falls", 0.9, 0.1) for name in ("unsafe_text_finds_unsafe_image@10", "zero_shot", "S-V@5")
    }
    part = {"text_is_unsafe": 1, "image_is_unsafe": 0, "rows": 9, "metrics": {"zero_shot": metrics["zero_shot"]}}
    evaluation = {
        "format": EVALUATION_FORMAT,
        "models": {side: {"name": "m", "weights_hash": side} for side in ("frozen", "tuned")},
        "rows": 40,
        "key_metrics": list(metrics),
        "metrics": metrics,
        "safe_unsafe_table": [part],
        "examples": [case(0, "hazard")],
        "worst_cases": [],
        "settings": {"confidence": 0.95, "data_hash": "d"},
        "embeddings": {},
    }
    return [json.dumps(evaluation).encode()]


def _dial_seeds() -> list[bytes]:
    metrics = {name: {"label": name, **estimate(0.5)} for name in (at(UNSAFE_RATE), "zero_shot")}
    points = [{"alpha": alpha, "metrics": metrics} for alpha in (0.0, 0.5, 1.0)]
    dial = {"format": DIAL_FORMAT, "safety": at(UNSAFE_RATE), "utility": "zero_shot", "points": points}
    return [json.dumps(dial).encode()]


def _log_seeds() -> list[bytes]:
    lines = [{"kind": kind, "step": step, "loss": 1 / step} for step in (1, 2) for kind in ("train", "val")]
    return ["".join(json.dumps(line) + "\n" for line in lines).encode()]


def _cache_seeds() -> list[bytes]:
    pictures = {side: torch.arange(2 * 4 * 4 * 3, dtype=torch.uint8).view(2, 4, 4, 3) for side in TENSORS[:2]}
    checksums = {side: torch.tensor([zlib.crc32(p.numpy().data) for p in pictures[side[:-6]]]) for side in TENSORS[2:]}
    seeds = []
    with tempfile.TemporaryDirectory() as folder:
        for number, tensors in enumerate((pictures | checksums, dict.fromkeys(NAMES, torch.ones(2, 3)))):
            path = Path(folder) / str(number)
            file = RowFile(path, {name: (x.dtype, x.shape) for name, x in tensors.items()}, {"rows": "2"})
            for name, rows in tensors.items():
                file.write(name, 0, rows)
            file.close()
            seeds.append(path.read_bytes())
    return seeds


def _bank_seeds() -> list[bytes]:
    generator = torch.Generator().manual_seed(0)
    text, image = torch.randn(2, 40, 16, generator=generator)
    seeds = []
    with tempfile.TemporaryDirectory() as folder:
        for bank in (SafeBank(text, image), SafeBank(text, image).pack()):
            bank.save(Path(folder) / "bank")
            seeds.append((Path(folder) / "bank").read_bytes())
    return seeds


def _checkpoint_seeds() -> list[bytes]:
    with tempfile.TemporaryDirectory() as folder:
        state = {"progress": {"step": 1}, "config": {}}
        return [CheckpointFolder(folder, keep=1).save(1, {"model.w": torch.ones(3)}, state).read_bytes()]


def _config_seeds() -> list[bytes]:
    return [b"optimizer:\n  lr: 1e-3\nlora:\n  targets: [in_proj, out_proj]\n", b"data: {train: x.csv}\nseed: 3\n"]


TARGETS = [
    Target("csv", ".csv", _read_quadruplets, (DataError,), _table_seeds),
    Target("jsonl", ".jsonl", _read_quadruplets, (DataError,), _jsonl_seeds),
    Target("visu", ".json", _read_quadruplets, (DataError,), _visu_seeds),
    Target("parquet", ".parquet", _read_quadruplets, (DataError,), _parquet_seeds),
    Target("parquet-images", ".parquet", _read_quadruplets, (DataError,), _held_seeds),
    Target("saved", ".arrow", _read_saved, (DataError,), _saved_seeds),
    Target(
        "saved-state", ".json", _read_state, (DataError,), lambda: [b'{"_data_files": [{"filename": "data.arrow"}]}']
    ),
    Target("csv-gz", ".csv.gz", _read_quadruplets, (DataError,), lambda: [gzip.compress(x) for x in _table_seeds()]),
    Target("shards", ".tar", _read_quadruplets, (DataError,), _shard_seeds),
    Target("class-shards", ".tar", _read_labeled, (DataError,), _class_shard_seeds),
    Target("class-names", ".txt", _read_labeled, (DataError,), lambda: [b"a {}\nno {}, not\n", b"{}\r\n\n{}"]),
    Target("templates", ".txt", lambda path: read_templates(str(path)), (ValueError,), lambda: [b"a {}\nno {}.\n"]),
    Target("label-csv", ".csv", _relabel, (ValueError,), _table_seeds),
    Target("label-jsonl", ".jsonl", _relabel, (ValueError,), _jsonl_seeds),
    Target("label-visu", ".json", _relabel, (ValueError,), _visu_seeds),
    Target("image", ".bin", lambda path: decode(path.read_bytes(), "input", 10_000), (ImageError,), _image_seeds),
    Target("bank", ".safetensors", _read_bank, (ValueError, BackendError), _bank_seeds),
    Target("checkpoint", ".safetensors", _read_checkpoint, (CheckpointError,), _checkpoint_seeds),
    Target("frozen", ".json", _read_record, (FrozenModelError,), _record_seeds),
    Target("cache", ".safetensors", _read_cache, (ValueError,), _cache_seeds),
    Target("evaluation", ".json", _read_run("evaluation.json"), (ValueError,), _evaluation_seeds),
    Target("dial", ".json", _read_run("dial.json"), (ValueError,), _dial_seeds),
    Target("guard", ".safetensors", _read_guard, (GuardError,), _guard_seeds),
    Target("guard-figures", ".json", _read_run("guard.json"), (ValueError,), lambda: [json.dumps(guard_of()).encode()]),
    Target(
        "gate-curve", ".json", _read_run("gate-curve.json"), (ValueError,), lambda: [json.dumps(gate_of()).encode()]
    ),
    Target("restored", ".json", _read_run("restore.json"), (ValueError,), lambda: [json.dumps(restored_of()).encode()]),
    Target("gate", ".json", described_in, (GateError,), _gate_seeds),
    Target("prompts", ".jsonl", lambda path: hash_prompts(read_prompts(path)), (DataError,), _prompt_seeds),
    Target(
        "prompts-csv",
        ".csv",
        lambda path: hash_prompts(read_prompts(path)),
        (DataError,),
        lambda: [b"prompt,category,seed\na dog,x,3\n"],
    ),
    Target("judge-categories", ".txt", read_categories, (DataError,), lambda: [b"# a\nblood: blood\nsafe: a dog\n"]),
    Target(
        "judge-words",
        ".txt",
        lambda path: WordJudge(read_words(path))(["a gun", ""]),
        (DataError,),
        lambda: [b"x: gun, big  gun\ny: (a)\n"],
    ),
    Target("texts", ".jsonl", _read_texts, (DataError,), lambda: [b'{"image": "a.png", "text": "a"}\n{"image"']),
    Target("made-with", ".json", _read_settings, (OtherSettingsError,), lambda: [b'{"steps": 2}', b'{"steps": 3}']),
    Target("table-data", ".yaml", _read_table_data, (ConfigError, ValueError), _table_data_seeds),
    Target("log", ".jsonl", _read_run("log.jsonl"), (ValueError,), _log_seeds),
    Target("config", ".yaml", load_config, (ConfigError,), _config_seeds),
    Target("source", ".txt", _read_source, (ValueError,), lambda: [b"n=3,seed=0", b"n=2,mismatch=0.5,size=16"]),
]
