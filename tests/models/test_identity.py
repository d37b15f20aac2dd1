"""What a model is, and how far from its tolerance lie rounding on one side and another model on the other."""

import dataclasses
import json
import re
import warnings

import pytest
import torch
from open_clip.transformer import QuickGELU

from saferclip_fast.models import load_clip
from saferclip_fast.models.identity import TOLERANCE, Identity, _distances, differences, identify

MODELS = ("ViT-tiny-8-32", "ViT-small-8-64", "RN-small-32")


@pytest.fixture(params=MODELS)
def clip(request):
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # random weights
        return load_clip(request.param)


def farthest(then: Identity, now: Identity, outputs: str = "") -> float:
    return max(size for name, size in _distances(then.behavior, now.behavior).items() if name.startswith(outputs))


@pytest.fixture
def other_threads():
    threads, precision = torch.get_num_threads(), torch.get_float32_matmul_precision()
    torch.set_num_threads(1 if threads > 1 else 2)
    torch.set_float32_matmul_precision("medium")
    yield
    torch.set_num_threads(threads)
    torch.set_float32_matmul_precision(precision)


def test_rounding_is_far_below_the_tolerance(clip, request):
    """In float64 lies what any device would round to."""
    before = identify(clip)
    request.getfixturevalue("other_threads")
    assert differences(before, identify(clip)) == [] and farthest(before, identify(clip)) < TOLERANCE / 500
    assert torch.get_float32_matmul_precision() == "medium", "put back"
    clip.model.double()
    preprocess = clip.preprocess
    clip.preprocess = lambda image: preprocess(image).double()
    exact = identify(clip)
    assert differences(before, exact) == [] and farthest(before, exact) < TOLERANCE / 500


def test_pixels_that_are_rounded_otherwise_are_the_same_model(clip):
    """As by another version of Pillow: one pixel in 20 a gray level higher."""
    before, preprocess = identify(clip), clip.preprocess

    def noisy(image):
        pixels = preprocess(image)
        chosen = torch.rand(pixels.shape, generator=torch.Generator().manual_seed(0)) < 0.05
        return pixels + chosen / 255 / 0.26

    clip.preprocess = noisy
    assert differences(before, identify(clip)) == []


def test_another_activation_is_another_model(clip):
    before = identify(clip)
    for module in list(clip.model.modules()):
        for name, child in module.named_children():
            if isinstance(child, torch.nn.GELU):
                setattr(module, name, QuickGELU())
    now = identify(clip)
    assert farthest(before, now) > 2 * TOLERANCE
    assert re.fullmatch(r"behavior \((image|text 1) by \d\.\de-0\d, .*\)", *differences(before, now))


@pytest.mark.parametrize("shift", [0.0369, (0.5 - 0.4815) / 0.2686])  # a mean of 0.4914, of 0.5
def test_another_mean_is_another_model(clip, shift):
    before, preprocess = identify(clip), clip.preprocess
    clip.preprocess = lambda image: preprocess(image) - shift
    now = identify(clip)
    assert farthest(before, now, "pixels") > 5 * TOLERANCE and "pixels by" in differences(before, now)[0]


def test_a_file_gives_it_back(clip):
    found = identify(clip)
    assert Identity.from_json(json.loads(json.dumps(found.as_json()))) == found


def test_weights_alone_are_compared_alone(clip):
    assert differences(Identity(clip.weights_hash), identify(clip)) == []
    assert differences(Identity("0" * 64), identify(clip)) == ["weights or architecture"]


@pytest.mark.parametrize("value", [None, [], {}, {"format": "x"}, "x", 3])
def test_what_is_no_record_is_refused(value):
    with pytest.raises(ValueError, match="its format is not"):
        Identity.from_json(value)


@pytest.mark.parametrize(
    "change", [{"weights_hash": 3}, {"preprocessing": None}, {"behavior": []}, {"behavior": {"image": ["x"]}}]
)
def test_a_record_of_other_kinds_of_values_is_refused(change):
    record = Identity("0" * 64, {}, "0", "3", {"image": [0.5]}).as_json()
    with pytest.raises(ValueError, match=r"is not text|of another kind"):
        Identity.from_json(record | change)


def test_numbers_that_are_lost_or_not_finite_differ():
    then = Identity("0", {}, "0", "3", {"image": [0.5, 0.5]})
    for numbers in ([0.5], [], [0.5, float("nan")]):
        assert "behavior" in differences(then, dataclasses.replace(then, behavior={"image": numbers}))[0]
