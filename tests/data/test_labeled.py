"""Class folders, shards of (image, cls) and clip_benchmark's sets, and what is said of bad ones."""

import sys

import pytest
import torch
from PIL import Image

from saferclip_fast.data import DataError, ToTensor
from saferclip_fast.data.labeled import image_files, open_labeled
from saferclip_fast.evaluate.zero_shot import class_embeddings, read_templates
from saferclip_fast.models import load_clip
from tests.support.quadruplet_files import image_bytes, write_tar


def items(images):
    dataset = images.open(ToTensor())
    return [dataset[i] for i in range(len(dataset))]


@pytest.fixture
def folders(tmp_path):
    for seed, name in enumerate(("big_cat/b.png", "big_cat/a.png", "ship/deep/c.PNG")):
        path = tmp_path / "set" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(image_bytes(seed))
    return tmp_path / "set"


def shard(seeds, labels, suffix="png"):
    members = {}
    for number, (seed, label) in enumerate(zip(seeds, labels, strict=True)):
        members |= {f"{number}.{suffix}": image_bytes(seed), f"{number}.cls": str(label).encode()}
    return members


def test_class_folders(folders):
    images = open_labeled(str(folders))
    assert (images.name, images.class_names, images.templates) == ("set", ["big cat", "ship"], None)
    (folders / "notes.txt").write_text("not an image")
    found = items(images)
    assert [label for _, label in found] == [0, 0, 1] and found[0][0].shape == (3, 10, 12)
    write_tar(folders.parent / "s.tar", shard([1, 0, 2], [0, 0, 1]))
    (folders.parent / "classnames.txt").write_text("big cat\nship\n")
    for (folder, _), (tar, _) in zip(found, items(open_labeled(str(folders.parent / "s.tar"))), strict=True):
        assert torch.equal(folder, tar)


@pytest.mark.parametrize("beside", [True, False], ids=["beside", "one folder above"])
def test_shards_with_class_names_and_templates(tmp_path, beside):
    (tmp_path / "test").mkdir()
    write_tar(tmp_path / "test" / "0.tar", shard([0, 1], [2, 0]))
    write_tar(tmp_path / "test" / "1.tar", shard([2], [1], "webp"))
    texts = tmp_path / "test" if beside else tmp_path
    (texts / "classnames.txt").write_text("a\nb\nc\n")
    (texts / "zeroshot_classification_templates.txt").write_text("a photo of a {c}.\nmy {c}\n")
    for source in (tmp_path / "test", tmp_path / "test" / "{0..1}.tar", tmp_path / "test" / "*.tar"):
        images = open_labeled(str(source), "mine")
        assert images.name == "mine" and images.templates == ["a photo of a {}.", "my {}"]
        assert [label for _, label in items(images)] == [2, 0, 1]


@pytest.mark.parametrize(
    ("members", "class_names", "message"),
    [
        ({"0.png": image_bytes(0)}, "a\nb\n", r"0.tar, row 1: sample '/0' needs an image \(jpg.*\) and cls"),
        ({"0.cls": b"1"}, "a\nb\n", "row 1: sample '/0' needs an image"),
        (shard([0, 1], [0, "cat"]), "a\nb\n", "row 2: cls of sample '/1' must be a class number, not 'cat'"),
        (shard([0, 1], [0, -1]), "a\nb\n", "row 2: cls of sample '/1' must be a class number, not '-1'"),
        (shard([0], [2]), "a\nb\n", "1 images, 1 labels from 2 to 2 and 2 class names do not fit together"),
        (shard([0], [0]), None, "no classnames.txt beside .* or one folder above"),
        ({"0.png": image_bytes(0), "0.cls": b"\xff"}, "a\n", "row 1: sample '/0': 0.cls is not UTF-8"),
        ({"readme": b""}, "a\n", "holds no image"),
    ],
)
def test_bad_shards(tmp_path, members, class_names, message):
    folder = tmp_path / "deep"
    folder.mkdir()
    write_tar(folder / "0.tar", members)
    if class_names is not None:
        (folder / "classnames.txt").write_text(class_names)
    with pytest.raises(DataError, match=message):
        open_labeled(str(folder))


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("classnames.txt", b"cat\n\xff\n", "classnames.txt is not UTF-8 text .* at byte 4"),
        ("zeroshot_classification_templates.txt", b"a {c}\n{c} {c}\n", "template 2: write {} once"),
        ("zeroshot_classification_templates.txt", b"\n", "templates.txt holds no template"),
    ],
)
def test_bad_texts_beside_shards(tmp_path, file, content, message):
    write_tar(tmp_path / "0.tar", shard([0], [0]))
    (tmp_path / "classnames.txt").write_text("a\n")
    (tmp_path / file).write_bytes(content)
    with pytest.raises(DataError, match=message):
        open_labeled(str(tmp_path))


def test_class_numbers_that_are_no_numbers(tmp_path):
    write_tar(tmp_path / "0.tar", shard([0], ["9" * 5000]))  # int() itself refuses so many digits
    with pytest.raises(DataError, match="cls of sample '/0' must be a class number"):
        open_labeled(str(tmp_path))


@pytest.mark.filterwarnings("ignore:.*random weights")
def test_other_braces_of_a_template_stay(tmp_path):
    (tmp_path / "prompts.txt").write_text("{0.__class__} a {} {x}\n")
    prompts = []

    def tokenizer(texts):
        prompts.extend(texts)
        return torch.zeros(len(texts), 1, dtype=torch.int64)

    clip = load_clip("ViT-tiny-8-32")
    clip.tokenizer = tokenizer
    class_embeddings(clip, ["cat", "{} dog"], read_templates(str(tmp_path / "prompts.txt")), progress=False)
    assert prompts == ["{0.__class__} a cat {x}", "{0.__class__} a {} dog {x}"]


def test_bad_folders(folders, tmp_path):
    with pytest.raises(DataError, match="a folder of images for each of at least two classes"):
        open_labeled(str(folders / "big_cat"))
    (folders / "empty").mkdir()
    with pytest.raises(DataError, match=r"empty holds no image \(.jpg"):
        open_labeled(str(folders))
    with pytest.raises(DataError, match=r"no such folder of images: .*none"):
        image_files(tmp_path / "none")
    with pytest.raises(DataError, match=r"cannot read .*none"):
        open_labeled(str(tmp_path / "none"))
    (folders / "empty" / "x.jpg").write_bytes(b"GIF89a?")
    with pytest.raises(DataError, match=r"broken image .*x.jpg.*\(delete or repair it\)"):
        items(open_labeled(str(folders)))


def test_generated_sets_and_their_options():
    images = open_labeled("scenes:n=6,size=16")
    assert len(items(images)) == 6 and len(images.class_names) == 48
    with pytest.raises(DataError, match=r"'scenes:n=6,sise=16' has no option sise; known: "):
        open_labeled("scenes:n=6,sise=16")


def test_clip_benchmark(tmp_path, monkeypatch):
    made_up = open_labeled(f"clip_benchmark:dummy,root={tmp_path}")
    assert (made_up.name, made_up.class_names) == ("dummy", ["blank image", "noisy image"])
    assert made_up.templates == ["a photo of a {}"] and len(items(made_up)) == 1
    (tmp_path / "cifar").mkdir()
    with pytest.raises(DataError, match=f"no folder {tmp_path}/none; make it first"):
        open_labeled(f"clip_benchmark:cifar10,root={tmp_path}/none")
    with pytest.raises(DataError, match="has no option rot; known: root, split, download"):
        open_labeled("clip_benchmark:cifar10,rot=x")
    with pytest.raises(DataError, match=f"clip_benchmark cannot open 'cifar10' in {tmp_path}/cifar: "):
        open_labeled(f"clip_benchmark:cifar10,root={tmp_path}/cifar,download=false")
    with pytest.raises(DataError, match="clip_benchmark cannot open 'no_such_set'"):
        open_labeled(f"clip_benchmark:no_such_set,root={tmp_path}/cifar")
    monkeypatch.setitem(sys.modules, "clip_benchmark.datasets.builder", None)
    with pytest.raises(ImportError, match=r"pip install 'saferclip-fast\[evaluate\]'"):
        open_labeled(f"clip_benchmark:cifar10,root={tmp_path}")


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("imagenet1k", "ImageNet"),
        ("caltech101", "caltech101.Caltech101"),
        ("pets", "OxfordIIITPet"),
        ("cars", "StanfordCars"),
        ("flowers", "Flowers102"),
        ("food101", "Food101"),
        ("fgvc_aircraft", "FGVCAircraft"),
        ("sun397", "SUN397"),
        ("dtd", "DTD"),
        ("eurosat", "EuroSAT"),
        ("cifar10", "CIFAR10"),
        ("cifar100", "CIFAR100"),
        ("stl10", "STL10"),
    ],
)
@pytest.mark.filterwarnings("ignore:split argument ignored")
def test_sets_of_clip_benchmark(tmp_path, monkeypatch, name, kind):
    """clip_benchmark's own code, with its class names and templates, over stand-ins for torchvision's data sets."""

    class Images:
        classes = ("a_class", "another")

        def __init__(self, root, transform, **_):
            assert root == str(tmp_path)
            self.transform = transform

        def __len__(self):
            return 2

        def __getitem__(self, index):
            return self.transform(Image.new("RGB", (8, 8), (index, 0, 0))), index

    monkeypatch.setattr(f"clip_benchmark.datasets.builder.{kind}", Images)
    images = open_labeled(f"clip_benchmark:{name},root={tmp_path}")
    assert images.name == name and len(images.class_names) >= 2
    assert images.templates and all(
        template.count("{}") == 1 and "{c}" not in template for template in images.templates
    )
    assert [label for _, label in items(images)] == [0, 1] and items(images)[1][0].shape == (3, 8, 8)
