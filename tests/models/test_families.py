"""A handful of open_clip's model families, made small; `make families` tries all of them."""

import warnings

import pytest
import torch

from saferclip_fast.models import load_clip

from .families import BEGIN, END, PAGE, shipped, try_family
from .small import small_timm, write_small

FEW = [
    "ViT-B-32",
    "RN50",
    "ViT-B-16-SigLIP",
    "coca_ViT-B-32",
    "EVA01-g-14",
    "EVA02-B-16",
    "convnext_base",
    "MobileCLIP-S1",
    "ViT-H-14-CLIPA",
    "mt5-base-ViT-B-32",
]
HUGGING_FACE = ["mt5-base-ViT-B-32", "roberta-ViT-B-32", "xlm-roberta-base-ViT-B-32", "nllb-clip-base"]


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """One folder for all: open_clip knows an architecture by its name, and the name by one file."""
    return tmp_path_factory.mktemp("models")


@pytest.fixture(autouse=True)
def quiet():
    with warnings.catch_warnings(), small_timm():
        warnings.filterwarnings("ignore", message=".*random weights.*")
        yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("name", FEW)
def test_a_family_trains_a_step_and_its_export_reads_back(models, tmp_path, name):
    trials = try_family(write_small(name, models), tmp_path, ["open_clip"])
    assert trials == {"lora": "", "full": ""}


@pytest.mark.parametrize("name", ["coca_base", "coca_ViT-B-32"])
def test_one_seed_gives_one_model(models, name):
    """open_clip leaves the projection of CoCa's decoder as memory has it: 1e23 or NaN, another one each time."""
    file, hashes = write_small(name, models), set()
    for _ in range(2):
        torch.manual_seed(0)
        clip = load_clip(str(file))
        hashes.add(clip.weights_hash)
        assert all(tensor.float().abs().max() < 10 for tensor in clip.exported_state_dict().values())
    assert len(hashes) == 1


@torch.no_grad()
@pytest.mark.parametrize("name", HUGGING_FACE)
def test_a_text_tower_of_hugging_face_reads_its_tokens_and_no_padding(models, name):
    """open_clip's own answer for all of the tokenizer's tokens; the tower itself would take 514, 1,024 or none."""
    clip = load_clip(str(write_small(name, models)))
    tokens = clip.tokenizer(["a dog", "two people"])
    assert tokens.shape[1] == clip.context_length == 77
    wanted = clip.model.encode_text(tokens)
    read = []
    tower = clip.model.text.transformer
    tower.register_forward_pre_hook(lambda _, __, given: read.append(given["input_ids"].shape), with_kwargs=True)
    longest = int((tokens != clip.pad_id).sum(1).max())
    torch.testing.assert_close(clip.encode_text(tokens[:, :longest]), wanted)
    assert read == [(2, longest)] and longest < 15


@torch.no_grad()
def test_a_text_tower_that_pads_with_another_token_gets_its_padding_back(models):
    clip = load_clip(str(write_small("roberta-ViT-B-32", models)))
    clip.model.text.config.pad_token_id = 3  # not the tokenizer's, so that open_clip attends to the padding
    clip.__init__(clip.model, clip.name, clip.preprocess, clip.tokenizer, clip.config)
    tokens = clip.tokenizer(["a dog"])
    torch.testing.assert_close(clip.encode_text(tokens[:, :9]), clip.model.encode_text(tokens))


def test_the_table_of_families_has_each_architecture_that_open_clip_ships():
    rows = PAGE.read_text().split(BEGIN)[1].split(END)[0]
    listed = {
        name for row in rows.splitlines() if row.startswith("|") for name in row.split("|")[1].strip().split(", ")
    }
    assert set(shipped()) <= listed, f"make families: {sorted(set(shipped()) - listed)} are new"
