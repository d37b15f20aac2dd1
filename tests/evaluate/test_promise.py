"""The promised dial on simulated data sets of known loss: how often it breaks its promise, how near the best it is."""

import pytest
import torch

from saferclip_fast.evaluate.promise import check_meaning, p_value, promise

LIMIT, CONFIDENCE = 0.02, 0.95


def data_sets(count, samples, dials, loss, churn):
    """`count` times losses by dial: +1 (was right, is wrong), -1 or 0, of mean loss(dial), not 0 in churn(dial)."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(count):
        found = []
        for dial in dials:
            up, down = (churn(dial) + loss(dial)) / 2, (churn(dial) - loss(dial)) / 2
            u = torch.rand(samples, generator=generator)
            found.append((dial, {"zero_shot": (u < up).float() - (u > 1 - down).float()}))
        yield found


def test_the_promise_is_broken_in_at_most_5_percent_of_1000_data_sets():
    """The hardest case: every dial loses a little more than the limit, so that any other than 0 breaks the promise."""
    sets = data_sets(1000, 1000, [0.5, 1.0], lambda dial: LIMIT + 1e-4, lambda dial: 0.03)
    broken = sum(promise(found, LIMIT, CONFIDENCE, n).alpha > 0 for n, found in enumerate(sets))
    assert 5 <= broken <= 50, "more is broken, and much less is a test without power"


def test_the_dial_is_within_a_tenth_of_the_best_on_10000_samples():
    dials = [n / 50 for n in range(1, 51)]
    sets = data_sets(20, 10_000, dials, lambda dial: 0.05 * dial**2, lambda dial: max(0.03 * dial, 0.05 * dial**2))
    chosen = [promise(found, LIMIT, CONFIDENCE, n).alpha for n, found in enumerate(sets)]
    best = max(dial for dial in dials if 0.05 * dial**2 <= LIMIT)
    assert max(chosen) <= best and sum(chosen) / len(chosen) >= 0.9 * best


def test_few_samples_promise_nothing_and_many_without_loss_everything():
    for samples, expected in ((20, 0), (1000, 1.0)):
        found = promise([(0.5, {"a": torch.zeros(samples)}), (1.0, {"a": torch.zeros(samples)})], LIMIT, CONFIDENCE)
        assert found.alpha == expected
        assert ("Nothing can be promised" in str(found)) == (expected == 0)


def test_it_stops_at_the_first_dial_that_fails_and_every_figure_has_to_pass():
    good, bad = torch.zeros(2000), (torch.arange(2000) % 10 == 0).float()
    found = promise(
        [(0.1, {"a": good, "b": good}), (0.2, {"a": good, "b": bad}), (0.3, {"a": good, "b": good})], 0.02, 0.9
    )
    assert found.alpha == 0.1 and [dial for dial, _ in found.tested] == [0.1, 0.2]
    assert found.figures == ("a", "b")
    assert (
        str(found)
        == "Dial 0.1 loses at most 2 points of zero-shot accuracy on images like those of a, b, with 90 % confidence."
    )


def test_the_order_of_the_data_does_not_matter_much():
    """Data are often sorted by class; samples are taken in random order, whatever order they come in."""
    losses = torch.cat([torch.ones(10), torch.zeros(1990)])
    assert p_value(losses, LIMIT, 0.05) < 0.05 and p_value(losses.flip(0), LIMIT, 0.05) < 0.05


@pytest.mark.parametrize(("max_loss", "confidence"), [(-0.1, 0.9), (1.0, 0.9), (0.02, 0.0), (0.02, 95)])
def test_bounds_without_a_meaning(max_loss, confidence):
    with pytest.raises(ValueError, match=r"--max-loss is a part|--confidence is a probability"):
        promise([], max_loss, confidence)


def test_a_bound_that_a_useless_model_would_keep_says_little():
    with pytest.raises(ValueError, match=r"the frozen model's accuracy on food is 0\.030; allow less than half of it"):
        check_meaning(0.02, {"zero_shot.food": 0.03, "zero_shot.pets": 0.9})
    with pytest.raises(ValueError, match="name sets of images"):
        check_meaning(0.02, {})
    check_meaning(0.02, {"zero_shot.food": 0.05})
