"""rho of SafeMERGE against its definition, and what is moved back."""

import pytest
import torch

from saferclip_fast.models.safety_subspace import overlaps, restored

GENERATOR = torch.Generator().manual_seed(0)


def random(*shape):
    return torch.randn(*shape, generator=GENERATOR)


def test_rho_is_the_cosine_of_the_change_and_its_projection():
    base, safe = {"w": random(6, 5)}, {"w": random(6, 5)}
    later = {"w": random(6, 5)}
    v, d = (safe["w"] - base["w"]).double(), (later["w"] - safe["w"]).double()
    projected = (v @ v.T / v.norm()) @ d
    expected = torch.cosine_similarity(projected.flatten(), d.flatten(), dim=0)
    assert overlaps(base, safe, later)["w"] == pytest.approx(float(expected), rel=1e-6)


def test_inside_outside_and_without_a_safe_change():
    start, out = torch.zeros(4, 3), torch.zeros(4, 3)
    out[0] = torch.tensor([1.0, 2, 3])  # safety acts on the first output alone
    same, other, vector = torch.zeros(4, 3), torch.zeros(4, 3), torch.zeros(4)
    same[0], other[2] = torch.tensor([-5.0, 0, 1]), torch.tensor([1.0, 1, 1])
    base = {"in": start, "out": start, "untouched": start, "vector": vector, "still": start, "count": torch.tensor(1)}
    safe = base | {"in": out, "out": out, "vector": vector + torch.tensor([1.0, 0, 0, 0])}
    later = {
        "in": out + same,
        "out": out + other,
        "untouched": other,
        "vector": vector + torch.tensor([1.0, 1, 0, 0]),
        "still": start,
        "count": torch.tensor(7),
    }
    assert overlaps(base, safe, later) == pytest.approx({"in": 1, "out": 0, "untouched": 0, "vector": 0})


def test_kernels_of_convolutions_are_matrices_of_their_outputs():
    base, safe, later = ({"w": random(4, 2, 3, 3)} for _ in range(3))
    flat = ({"w": state["w"].flatten(1)} for state in (base, safe, later))
    assert overlaps(base, safe, later) == pytest.approx(overlaps(*flat))


@pytest.mark.parametrize("name", ["visual.proj", "text_projection", "text.text_projection"])
def test_projections_that_multiply_from_the_right_are_turned(name):
    base, safe, later = ({"w": random(6, 5)} for _ in range(3))
    turned = ({name: state["w"].T} for state in (base, safe, later))
    assert overlaps(*turned)[name] == pytest.approx(overlaps(base, safe, later)["w"])


def test_a_later_weight_that_is_not_finite_is_named():
    base, safe, later = ({"a": random(3), "b": random(3, 3)} for _ in range(3))
    later["b"][1, 1] = float("nan")
    with pytest.raises(ValueError, match="hold NaN or Inf, first in b"):
        overlaps(base, safe, later)


def test_the_safe_change_is_added_to_chosen_weights_and_the_others_stay_bit_for_bit():
    base, safe, later = ({"a": random(3, 3), "b": random(3), "count": torch.tensor(i)} for i in range(3))
    found = restored(base, safe, later, {"a"}, 0.25)
    torch.testing.assert_close(found["a"], later["a"] + 0.25 * (safe["a"] - base["a"]))
    assert torch.equal(found["b"], later["b"]) and found["count"] == 2
    assert all(torch.equal(restored(base, safe, later, {"a", "b"}, 0.0)[name], later[name]) for name in later)


def test_variances_stay_positive():
    base, safe, later = ({"bn.running_var": torch.tensor([x])} for x in (2.0, 0.5, 1.0))
    assert float(restored(base, safe, later, {"bn.running_var"}, 1.0)["bn.running_var"]) == 0


def test_another_architecture_is_named():
    one, other = {"w": random(2, 2)}, {"w": random(2, 3)}
    for states in ((one, one, other), (other, one, one)):
        with pytest.raises(ValueError, match="different models: w does not match"):
            restored(*states, (), 1.0)
