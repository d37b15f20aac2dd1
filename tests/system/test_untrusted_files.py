"""Files that came from elsewhere: nothing in them is run, and none is larger, or lies further, than it may."""

import ast
import os
import pickle
import tarfile
import warnings
from pathlib import Path

import pytest
import torch
from PIL import Image

from saferclip_fast import SafeBank
from saferclip_fast.data import DataError, ImageError, ImageFile, open_quadruplets, write_shards
from saferclip_fast.data.images import MAX_PIXELS, decode
from saferclip_fast.data.labeled import open_labeled
from saferclip_fast.models import load_clip
from tests.data.test_images import png_claiming
from tests.support.quadruplet_files import image_bytes, write_rows, write_tar

ROOT = Path(__file__).parents[2]
SOURCES = [*(ROOT / "saferclip_fast").rglob("*.py"), *(ROOT / "benchmarks").rglob("*.py"), *ROOT.glob("examples/*.py")]

# Modules that run what they read, and calls that do.
RUNS_WHAT_IT_READS = {"pickle", "cPickle", "_pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib"}
FORBIDDEN_CALLS = {
    "eval": "runs text",
    "exec": "runs text",
    "os.system": "a shell",
    "os.popen": "a shell",
    "torch.save": "writes a pickle: use files.save_tensors",
    "yaml.load": "builds objects: use OmegaConf or yaml.safe_load",
    "yaml.unsafe_load": "builds objects",
}
UNPACKING = {"extract", "extractall", "unpack_archive"}  # of tarfile, zipfile, shutil


def faults(source: str) -> list[str]:
    """The calls in Python `source` that would run, or unpack, what a file holds."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            found += [f"imports {name}" for name in names if name.split(".")[0] in RUNS_WHAT_IT_READS]
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        if called in FORBIDDEN_CALLS:
            found.append(f"{called}: {FORBIDDEN_CALLS[called]}")
        if called == "torch.load" and given.get("weights_only") != "True":
            found.append("torch.load without weights_only=True")
        if given.get("shell") == "True":
            found.append(f"{called} with a shell")
        if given.get("allow_pickle") == "True" or given.get("weights_only") == "False":
            found.append(f"{called} unpickles")
        if called.split(".")[-1] in UNPACKING:
            found.append(f"{called} unpacks an archive")
    return found


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from joblib import load",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "numpy.load(path, allow_pickle=True)",
        "torch.save(x, path)",
        "subprocess.run(text, shell=True)",
        "archive.extractall(folder)",
        "eval(text)",
    ],
)
def test_the_search_below_finds(source):
    assert faults(source)


def test_nothing_unpickles_unpacks_or_asks_a_shell():
    assert len(SOURCES) > 80
    assert {str(path): found for path in SOURCES if (found := faults(path.read_text()))} == {}


class Bomb:
    """Unpickled, it leaves a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("write", [torch.save, lambda bomb, path: path.write_bytes(pickle.dumps(bomb))])
def test_weights_that_are_a_pickle_are_refused_not_run(tmp_path, write):
    trap, weights = tmp_path / "sprung", tmp_path / "weights.pt"
    write({"w": Bomb(trap)}, weights)
    torch.load(weights, weights_only=False) if write is torch.save else pickle.loads(weights.read_bytes())
    assert trap.exists(), "the trap works"
    trap.unlink()
    with pytest.raises(Exception):  # noqa: B017 - torch's own error, whose type is not ours
        load_clip("ViT-tiny-8-32", str(weights))
    with pytest.raises(ValueError, match="not a safetensors file"):
        SafeBank.load(weights)
    assert not trap.exists()


# --- images that are larger than they look ---------------------------------------------------------


@pytest.mark.parametrize("side", [10_000, 15_000, 40_000])  # over our limit; over Pillow's warning; over Pillow's own
def test_an_image_bomb_is_refused_on_its_header(side):
    bomb = png_claiming(side, side)
    assert len(bomb) < 200
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        with pytest.raises(ImageError, match=r"image x (has|is larger).*pixels.*scale it down") as told:
            decode(bomb, "x")
    assert str(MAX_PIXELS) in str(told.value)


def test_a_picture_of_one_color_that_expands_a_thousandfold_is_refused(tmp_path):
    path = tmp_path / "bomb.png"
    Image.new("L", (4_000, 4_000)).save(path)
    assert path.stat().st_size < 20_000
    with pytest.raises(ImageError, match=r"bomb.png has 4000 x 4000 pixels, more than max_pixels=15999999"):
        ImageFile(str(path)).load(4_000**2 - 1)
    assert ImageFile(str(path)).load().size == (4_000, 4_000)


def bomb_rows(tmp_path: Path) -> Path:
    (tmp_path / "bomb.png").write_bytes(png_claiming(40_000, 40_000))
    (tmp_path / "good.png").write_bytes(image_bytes(0))
    good = {"safe_image": "good.png", "unsafe_image": "good.png", "safe_text": "a cat", "unsafe_text": "a hazard"}
    return write_rows(tmp_path / "data.jsonl", [good, {**good, "unsafe_image": "bomb.png"}])


def test_a_bomb_in_a_table_is_named_or_skipped(tmp_path):
    table = bomb_rows(tmp_path)
    with pytest.raises(DataError, match=r"data.jsonl, row 2: image .*bomb.png is larger than max_pixels="):
        open_quadruplets(table, verify=True, progress=False)
    data = open_quadruplets(table, on_error="skip", progress=False)
    assert len(data) == 1 and data.summary.reasons["bad image"] == 1


@pytest.mark.parametrize("content", [png_claiming(40_000, 40_000), b"no image"])
def test_writing_shards_names_an_image_that_it_cannot_store(tmp_path, content):
    table = bomb_rows(tmp_path)
    (tmp_path / "bomb.png").write_bytes(content)
    with pytest.raises(ImageError, match=r"image .*bomb.png"):
        write_shards(open_quadruplets(table), tmp_path / "shards", progress=False)
    assert not list((tmp_path / "shards").iterdir()), "half a shard was left"


# --- archives and links ----------------------------------------------------------------------------

TEXTS = b'{"safe_text": "a cat", "unsafe_text": "a hazard"}'


@pytest.mark.parametrize("key", ["../../escaped/0", "/tmp/absolute/0", "a/../../0"])
def test_members_that_name_places_outside_write_nothing(tmp_path, monkeypatch, key):
    """A tar is an index of bytes here: its names are keys, never paths."""
    inner = tmp_path / "a" / "b"
    inner.mkdir(parents=True)
    monkeypatch.chdir(inner)
    image = image_bytes(0)
    members = {f"{key}.safe_image.png": image, f"{key}.unsafe_image.png": image, f"{key}.json": TEXTS}
    data = open_quadruplets(write_tar(inner / "x.tar", members))
    assert data[0]["safe_text"] == "a cat" and data.content_hash()
    [shard] = write_shards(data, inner / "out", progress=False)
    with tarfile.open(shard) as archive:
        assert all(name.startswith("00000000.") for name in archive.getnames())
    files = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert files == {"a/b/x.tar", "a/b/out/000000.tar"}


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE])
def test_links_and_devices_in_a_tar_are_not_followed(tmp_path, kind):
    (tmp_path / "secret.png").write_bytes(image_bytes(0))
    path = write_tar(tmp_path / "x.tar", {"0.unsafe_image.png": image_bytes(1), "0.json": TEXTS})
    with tarfile.open(path, "a") as archive:
        link = tarfile.TarInfo("0.safe_image.png")
        link.type, link.linkname = kind, str(tmp_path / "secret.png")
        archive.addfile(link)
    with pytest.raises(DataError, match="no safe_image"):
        open_quadruplets(path)


def test_a_member_that_claims_more_bytes_than_there_are(tmp_path):
    path = write_tar(tmp_path / "x.tar", {"0.safe_image.png": image_bytes(1)})
    data = bytearray(path.read_bytes())
    with tarfile.open(path) as archive:
        header = archive.next()
    header.size = 1 << 40
    data[: tarfile.BLOCKSIZE] = header.tobuf(tarfile.GNU_FORMAT)
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"the file ends inside '0\.safe_image\.png'"):
        open_quadruplets(path)


@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
@pytest.mark.parametrize("name", ["../secret.png", "/secret.png", "images/../../secret.png", "link/../../secret.png"])
def test_paths_in_a_table_stay_in_its_folder(tmp_path, suffix, name):
    (tmp_path / "secret.png").write_bytes(image_bytes(0))
    root = tmp_path / "root"
    (root / "images").mkdir(parents=True)
    (root / "link").symlink_to(root / "images")
    name = str(tmp_path / "secret.png") if name.startswith("/") else name
    row = {"safe_image": name, "unsafe_image": name, "safe_text": "a", "unsafe_text": "b"}
    table = root / f"data{suffix}"
    if suffix == ".csv":
        table.write_text(",".join(row) + "\n" + ",".join(row.values()) + "\n")
    else:
        write_rows(table, [row])
    with pytest.raises(DataError, match=r"row \d: safe_image: (image path .* leaves its root|absolute image path)"):
        open_quadruplets(table)


def test_class_folders_hold_regular_files_alone(tmp_path):
    """A pipe among the images would block for ever."""
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "0.png").write_bytes(image_bytes(0))
    os.mkfifo(tmp_path / "cat" / "1.png")
    images = open_labeled(str(tmp_path)).open(lambda image: image.size)
    assert len(images) == 2
