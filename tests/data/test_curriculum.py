"""The curriculum: easy third first, deterministic shuffles, and resuming at any sample."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from saferclip_fast.data import CurriculumSampler

similarities = st.lists(st.floats(-1, 1, width=32), min_size=1, max_size=60)


@given(similarities, st.integers(0, 5), st.integers(1, 6))
@settings(max_examples=100, deadline=None)
def test_an_epoch_is_a_permutation_of_its_easiest_samples(values: list[float], seed: int, epoch: int) -> None:
    sampler = CurriculumSampler(values, seed)
    sampler.set_epoch(epoch)
    drawn = list(sampler)
    assert len(drawn) == len(set(drawn)) == len(sampler) == -(-len(values) * min(epoch, 3) // 3)
    left_out = set(range(len(values))) - set(drawn)
    if left_out:
        assert min(values[i] for i in drawn) >= max(values[i] for i in left_out)
    assert list(sampler) == drawn == list(CurriculumSampler(torch.tensor(values), seed).epoch_indices(epoch))


@given(similarities, st.integers(1, 4), st.data())
@settings(max_examples=100, deadline=None)
def test_a_resumed_epoch_gives_exactly_the_remaining_samples(values: list[float], epoch: int, data: st.DataObject):
    whole = CurriculumSampler(values, seed=7)
    whole.set_epoch(epoch)
    drawn = list(whole)
    start = data.draw(st.integers(0, len(drawn)))
    resumed = CurriculumSampler(values, seed=7)
    resumed.set_epoch(epoch, start)
    assert list(resumed) == drawn[start:] and len(resumed) == len(drawn) - start


def test_epochs_and_seeds_shuffle_differently() -> None:
    sampler = CurriculumSampler(np.linspace(0, 1, 300), seed=0)
    third, fourth = sampler.epoch_indices(3), sampler.epoch_indices(4)
    assert sorted(third) == sorted(fourth) == list(range(300))
    assert list(third) != list(fourth)
    assert list(third) != list(CurriculumSampler(np.linspace(0, 1, 300), seed=1).epoch_indices(3))


def test_ties_keep_index_order_and_stages_can_be_switched_off() -> None:
    assert sorted(CurriculumSampler(np.zeros(9)).epoch_indices(1)) == [0, 1, 2]
    assert sorted(CurriculumSampler(np.arange(5.0), stages=(1.0,)).epoch_indices(1)) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([],), "one value per sample, got shape"),
        (([[0.1, 0.2]],), "one value per sample, got shape"),
        (([0.5, float("nan")],), "similarity of row 1 is nan"),
        (([0.5], -1), "seed must not be negative"),
        (([0.5], 0, ()), "stages must be shares"),
        (([0.5], 0, (0.5, 1.2)), "stages must be shares"),
    ],
)
def test_bad_input_is_named(arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CurriculumSampler(*arguments)


def test_bad_epochs_are_named() -> None:
    sampler = CurriculumSampler([0.1, 0.2, 0.3])
    with pytest.raises(ValueError, match="epochs count from 1"):
        sampler.set_epoch(0)
    with pytest.raises(ValueError, match="between 0 and the epoch's 1 samples"):
        sampler.set_epoch(1, start=2)
