"""Synthetic scenes: deterministic, captioned, visibly unsafe, and with better safe matches than the fixed partners."""

import itertools

import numpy as np
import open_clip
import pytest
import torch

from saferclip_fast.data import SceneDataset, open_quadruplets
from saferclip_fast.data.synthetic import scene_render, scenes


@pytest.fixture(scope="module")
def data() -> SceneDataset:
    return SceneDataset(n=600, seed=3)


def test_items_follow_the_data_set_contract(data: SceneDataset) -> None:
    item = data[7]
    assert item["index"] == 7
    for side in ("safe", "unsafe"):
        assert item[f"{side}_image"].shape == (3, 32, 32) and item[f"{side}_image"].dtype == torch.float32
        pixels = torch.from_numpy(getattr(data, f"{side}_images")[7]).permute(2, 0, 1).float() / 255
        assert torch.equal(item[f"{side}_image"], pixels)
        assert item[f"{side}_text"] == getattr(data, f"{side}_captions")[7]
    assert (item["unsafe_text_label"], item["unsafe_image_label"]) == (1, 1)
    with pytest.raises(IndexError):
        data[600]


def test_same_seed_same_content_other_seed_other_content(data: SceneDataset) -> None:
    assert SceneDataset(n=600, seed=3).content_hash() == data.content_hash()
    assert SceneDataset(n=600, seed=4).content_hash() != data.content_hash()
    assert SceneDataset(n=600, seed=3, split="test").content_hash() != data.content_hash()


def test_rendering_does_not_depend_on_the_block(data: SceneDataset) -> None:
    one_by_one = np.concatenate([data.unsafe[row : row + 1].render(32) for row in range(250, 262)])
    assert np.array_equal(one_by_one, data.unsafe_images[250:262])


def test_fixed_partners_differ_with_the_set_probability(data: SceneDataset) -> None:
    shared = (data.safe.codes == data.unsafe.codes).sum(axis=1)
    assert abs((shared < 5).mean() - 0.7) < 0.06
    assert set(shared) == {2, 3, 4, 5}  # one to three attributes change
    exact = SceneDataset(n=50, mismatch=0.0)
    assert np.array_equal(exact.safe.codes, exact.unsafe.codes)
    assert exact.safe_captions == exact.right_texts
    never = SceneDataset(n=200, mismatch=1.0)
    assert ((never.safe.codes == never.unsafe.codes).sum(axis=1) < 5).all()


def test_most_poorly_paired_scenes_have_a_better_match_in_the_set() -> None:
    data = SceneDataset(n=3000)
    fixed = (data.safe.codes == data.unsafe.codes).sum(axis=1)
    best = (data.safe.codes[None] == data.unsafe.codes[:500, None]).sum(axis=2).max(axis=1)
    poor = fixed[:500] < 5
    assert (best[poor] > fixed[:500][poor]).mean() > 0.8


def test_captions_name_the_hazard_and_only_the_unsafe_ones(data: SceneDataset) -> None:
    phrases = list(scenes.HAZARD_PHRASES.values())
    for row, (safe, unsafe, right) in enumerate(
        zip(data.safe_captions, data.unsafe_captions, data.right_texts, strict=True)
    ):
        phrase = scenes.HAZARD_PHRASES[scenes.HAZARDS[data.unsafe.hazard[row]]]
        assert phrase in unsafe
        assert unsafe.replace(f" {phrase}", "") == right
        assert not any(other in text for other in phrases for text in (safe, right))


def test_every_hazard_is_visible_and_every_attribute_changes_the_picture() -> None:
    plain = scenes.sample_scenes(40, np.random.default_rng(0))
    safe = plain.render(32).astype(int)
    for hazard in range(len(scenes.HAZARDS)):
        unsafe = scenes.Scenes(plain.codes, np.full(40, hazard), plain.layout).render(32).astype(int)
        changed = (np.abs(unsafe - safe).max(axis=-1) > 40).mean(axis=(1, 2))
        assert changed.min() > 0.01, scenes.HAZARDS[hazard]
    for column, (name, values) in enumerate(scenes.ATTRIBUTES.items()):
        codes = plain.codes.copy()
        codes[:, column] = (codes[:, column] + 1) % len(values)
        other = scenes.Scenes(codes, plain.hazard, plain.layout).render(32).astype(int)
        assert (np.abs(other - safe).max(axis=(1, 2, 3)) > 25).all(), name


def test_captions_are_distinct_and_fit_a_context_of_24_tokens() -> None:
    every = np.array(list(itertools.product(*map(range, scenes.SIZES))))
    assert len(every) == scenes.COMBINATIONS
    captions = []
    for hazard in range(-1, len(scenes.HAZARDS)):
        captions += scenes.Scenes(every, np.full(len(every), hazard), np.zeros((len(every), 4))).captions()
    assert len(set(captions)) == len(captions)
    longest = sorted(captions, key=len)[-200:]
    assert int((open_clip.get_tokenizer("ViT-B-32")(longest) != 0).sum(dim=1).max()) <= 24


def test_test_split_has_one_right_safe_image_each() -> None:
    data = SceneDataset(n=300, split="test")
    assert len(set(data.unsafe.scene_ids().tolist())) == 300
    assert np.array_equal(data.right.scene_ids(), data.unsafe.scene_ids())
    assert (data.right.hazard == scenes.NO_HAZARD).all()
    with pytest.raises(ValueError, match="only 1152 scenes differ"):
        SceneDataset(n=4000, split="test", unique=True)


def test_mixed_pairs_carry_their_labels() -> None:
    data = SceneDataset(n=400, mixed=0.5)
    text, image = data.unsafe_text_labels, data.unsafe_image_labels
    assert abs((text * image == 0).mean() - 0.5) < 0.1 and not ((text == 0) & (image == 0)).any()
    safe_text = int(np.flatnonzero(text == 0)[0])
    safe_image = int(np.flatnonzero(image == 0)[0])
    assert data.unsafe_captions[safe_text] == data.right_texts[safe_text]
    assert np.array_equal(data.unsafe_images[safe_image], data.right_images[safe_image])
    assert data[safe_text]["unsafe_text_label"] == 0 and data[safe_image]["unsafe_image_label"] == 0


def test_zero_shot_labels_agree_with_the_captions(data: SceneDataset) -> None:
    names, labels = scenes.class_names("color shape"), scenes.class_labels(data.safe, "color shape")
    assert len(names) == 48
    for caption, label in zip(data.safe_captions, labels, strict=True):
        color, shape = names[label].split()
        assert color in caption.split() and shape in caption.split()
    for kind in ("shape", "color"):
        chosen = np.array(scenes.class_names(kind))[scenes.class_labels(data.safe, kind)]
        assert all(name in text.split() for name, text in zip(chosen, data.safe_captions, strict=True))
    with pytest.raises(ValueError, match="kind must be"):
        scenes.class_labels(data.safe, "taste")


def test_pretraining_pairs_know_hazards_and_short_prompts() -> None:
    images, captions = scenes.pretrain_pairs(400, seed=1)
    assert images.shape == (400, 32, 32, 3) and images.dtype == np.uint8 and len(captions) == 400
    unsafe = [any(phrase in text for phrase in scenes.HAZARD_PHRASES.values()) for text in captions]
    assert 0.3 < np.mean(unsafe) < 0.6
    assert min(len(text.split()) for text in captions) == 3  # "a red star"


def test_sizes_and_sources() -> None:
    assert SceneDataset(n=3, size=48).safe_images.shape == (3, 48, 48, 3)
    opened = open_quadruplets("scenes:n=20,seed=5,split=test,mismatch=0.5")
    assert opened.content_hash() == SceneDataset(20, 5, "test", mismatch=0.5).content_hash()
    assert opened.verify() is opened


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("scenes:n=0", "n >= 1"),
        ("scenes:size=4", "size <= 1024"),
        ("scenes:split=dev", "split must be one of"),
        ("scenes:mismatch=1.5", "probabilities"),
        ("scenes:color=red", "has no option color; known: hazards, mismatch, mixed, n"),
        ("scenes:n", "expected name=value, got 'n'"),
        ("scenes:n=many", "bad option in source 'scenes:n=many'"),
        ("scenes:transform=x", "has no option transform"),
    ],
)
def test_bad_options_are_named(source: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        open_quadruplets(source)


def test_shapes_fill_their_box_and_stay_inside() -> None:
    axis = np.linspace(-1.5, 1.5, 61, dtype=np.float32)
    u, v = np.meshgrid(axis, axis)
    for name, shape in scene_render.SHAPES.items():
        inside = shape(u[None], v[None])[0] < 0
        assert 0.1 < inside.mean() < 0.5, name
        assert not inside[np.hypot(u, v) > 1.25].any(), name


def test_hazards_are_those_that_are_chosen() -> None:
    some = open_quadruplets("scenes:n=60,seed=2,hazards=tape+fire")
    fire, tape = (scenes.HAZARD_PHRASES[name] for name in ("fire", "tape"))
    assert all((fire in text) != (tape in text) for text in some.unsafe_captions)
    assert {scenes.HAZARDS[number] for number in some.unsafe.hazard} == {"fire", "tape"}
    assert SceneDataset(60, 2, hazards="tape+fire").content_hash() == some.content_hash()
    assert SceneDataset(60, 2, hazards="tape").content_hash() != some.content_hash()
    with pytest.raises(ValueError, match=r"hazards=fire\+flood: 'flood' is none; join some of fire, spikes, tape"):
        open_quadruplets("scenes:n=4,hazards=fire+flood")
    with pytest.raises(ValueError, match=r"hazards=fire\+fire has a name twice; join some of fire, spikes"):
        SceneDataset(4, hazards="fire+fire")


def test_all_hazards_by_name_are_the_default() -> None:
    assert SceneDataset(50, hazards="+".join(scenes.HAZARDS)).content_hash() == SceneDataset(50).content_hash()
