"""The safety dial on weights whose mixture is known."""

import pytest
import torch

from saferclip_fast.models.dial import interpolate

FROZEN = {"w": torch.tensor([0.1, 2.0]), "bn.running_var": torch.tensor([1.0]), "bn.batches": torch.tensor(3)}
TUNED = {"w": torch.tensor([0.7, -2.0]), "bn.running_var": torch.tensor([0.2]), "bn.batches": torch.tensor(9)}


def test_both_ends_are_exact_and_the_middle_is_linear():
    assert torch.equal(interpolate(FROZEN, TUNED, 0)["w"], FROZEN["w"])
    assert torch.equal(interpolate(FROZEN, TUNED, 1)["w"], TUNED["w"])
    torch.testing.assert_close(interpolate(FROZEN, TUNED, 0.25)["w"], torch.tensor([0.25, 1.0]))
    torch.testing.assert_close(interpolate(FROZEN, TUNED, 1.5)["w"], torch.tensor([1.0, -4.0]))


def test_variances_stay_positive_and_counters_whole():
    beyond = interpolate(FROZEN, TUNED, 1.5)
    assert beyond["bn.running_var"] == 0 and beyond["bn.batches"] == 9


def test_other_models_are_refused():
    with pytest.raises(ValueError, match="different models: b does not match"):
        interpolate(FROZEN, TUNED | {"b": torch.zeros(1)}, 0.5)
    with pytest.raises(ValueError, match="different models: w does not match"):
        interpolate(FROZEN, TUNED | {"w": torch.zeros(3)}, 0.5)
