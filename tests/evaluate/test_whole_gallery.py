"""Places, areas and shares over the whole gallery against a double loop; chance levels against random order."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from saferclip_fast.data.quadruplets import QuadrupletEmbeddings
from saferclip_fast.evaluate import whole_gallery
from saferclip_fast.evaluate.chance import any_among, first_place
from saferclip_fast.evaluate.metrics import Labels, retrieval
from saferclip_fast.evaluate.right_items import Contents
from saferclip_fast.evaluate.whole_gallery import standing


def naive(queries, gallery, unsafe, right):
    """(first unsafe place, P(safe above unsafe), unsafe share of the first R) of each query, pair by pair."""
    answers = []
    for query, wanted in zip(queries.double(), right.tolist(), strict=True):
        scores = [float(query @ item / query.norm() / item.norm()) for item in gallery.double()]
        order = sorted(range(len(scores)), key=lambda row: (-scores[row], row))
        places = [place for place, row in enumerate(order, 1) if unsafe[row]]
        bad, good = ([s for s, flag in zip(scores, unsafe, strict=True) if flag == kind] for kind in (True, False))
        wins = [(a > b) + (a == b) / 2 for a in good for b in bad]
        share = sum(bool(unsafe[row]) for row in order[:wanted]) / wanted
        nan = float("nan")
        answers.append((places[0] if places else nan, sum(wins) / len(wins) if wins else nan, share))
    return torch.tensor(answers).T


def corners(rows, generator):
    """[rows, 4] of 0, 1 and -1 with exactly one or exactly four that are not 0: cosines are exact, and often equal."""
    signs = torch.randint(0, 2, (rows, 4), generator=generator) * 2.0 - 1
    one = torch.eye(4)[torch.randint(0, 4, (rows,), generator=generator)]
    return torch.where(torch.rand(rows, 1, generator=generator) < 0.5, signs, signs * one)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 9), st.integers(1, 24), st.integers(0, 2**20), st.booleans(), st.floats(0, 1), st.integers(1, 99))
def test_whatever_the_gallery_it_is_what_a_double_loop_says(count, size, seed, ties, mix, block):
    generator = torch.Generator().manual_seed(seed)
    draw = corners if ties else lambda rows, generator: torch.randn(rows, 5, generator=generator)
    queries, gallery = draw(count, generator), draw(size, generator)
    unsafe = torch.rand(size, generator=generator) < mix  # all safe and all unsafe ones among them
    right = torch.randint(1, size + 1, (count,), generator=generator)
    whole_gallery.SCORES, kept = block, whole_gallery.SCORES
    try:
        found = standing(queries, gallery, unsafe, right)
    finally:
        whole_gallery.SCORES = kept
    torch.testing.assert_close(torch.stack(list(found)), naive(queries, gallery, unsafe, right), equal_nan=True)


@pytest.mark.parametrize("flag", [False, True])
def test_galleries_of_one_kind(flag):
    found = standing(torch.eye(3), torch.eye(3), torch.full((3,), flag), torch.ones(3, dtype=torch.int64))
    assert found.safe_above.isnan().all() and found.unsafe_share.tolist() == [flag] * 3
    assert found.first_unsafe.tolist() == [1] * 3 if flag else found.first_unsafe.isnan().all()


def test_equal_scores_count_half_and_the_lower_row_comes_first():
    gallery = torch.tensor([[1.0, 0.0]] * 4)
    unsafe = torch.tensor([False, False, True, True])
    found = standing(torch.ones(1, 2), gallery, unsafe, torch.tensor([3]))
    assert (found.first_unsafe.item(), found.safe_above.item()) == (3, 0.5)
    assert found.unsafe_share.item() == pytest.approx(1 / 3)


def test_scores_are_held_a_block_at_a_time(monkeypatch):
    seen = []
    whole = whole_gallery._standing_of
    monkeypatch.setattr(whole_gallery, "SCORES", 100)
    monkeypatch.setattr(
        whole_gallery, "_standing_of", lambda scores, *rest: seen.append(scores.shape) or whole(scores, *rest)
    )
    standing(torch.randn(7, 3), torch.randn(40, 3), torch.arange(40) > 20, torch.ones(7, dtype=torch.int64))
    assert seen == [(2, 40), (2, 40), (2, 40), (1, 40)]


def random_rows(count, seed, width=6):
    return QuadrupletEmbeddings(*torch.randn(4, count, width, generator=torch.Generator().manual_seed(seed)).unbind())


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 30), st.integers(0, 2**20))
def test_the_whole_gallery_agrees_with_the_first_items(count, seed):
    """The place says at which K an unsafe item is found; where one item is right, the share at R is that at 1."""
    generator = torch.Generator().manual_seed(seed)
    labels = Labels(Contents.distinct(count), *torch.randint(0, 2, (2, count), generator=generator))
    found = retrieval(random_rows(count, seed), labels)
    for query, other, flags in (("text", "image", labels.image_is_unsafe), ("image", "text", labels.text_is_unsafe)):
        for name in (f"safe_{query}", f"unsafe_{query}"):
            assert (f"{name}_first_unsafe_rank" in found) == (f"{name}_unsafe_share@R" in found and bool(flags.any()))
            if (place := found.get(f"{name}_first_unsafe_rank")) is None:
                continue
            for k in (1, 5, 10, 20):
                assert torch.equal((place.values <= k).float(), found[f"{name}_finds_unsafe_{other}@{k}"].values)
            assert place.values.min() >= 1 and place.values.max() <= place.last
        one = flags == 1  # else the other side's item is right, too
        share, first = (found[f"safe_{query}_unsafe_share@{k}"].values[one] for k in ("R", 1))
        assert torch.equal(share, first)


def test_as_many_items_as_there_are_right_ones():
    # one class of three samples, another of one; the gallery of queries: own class safe, then unsafe, then the rest
    labels = Labels.default(4)._replace(classes=torch.tensor([0, 0, 0, 1]))
    text = torch.tensor([[1.0, 0.0]]).expand(4, 2)
    angles = torch.tensor([0.1, 0.2, 0.5, 0.6, 0.3, 0.4, 0.7, 0.8])  # safe images, then unsafe ones
    images = torch.stack([angles.cos(), angles.sin()], 1)
    found = retrieval(QuadrupletEmbeddings(text, images[:4], text, images[4:]), labels)
    share = found["unsafe_text_unsafe_share@R"]
    assert share.values.tolist() == pytest.approx([1 / 3, 1 / 3, 1 / 3, 0]) and share.wanted == "falls"
    place = found["unsafe_text_first_unsafe_rank"]
    assert place.values.tolist() == [3] * 4 and (place.unit, place.last, place.wanted) == ("place", 5, "rises")
    # of 16 pairs, safe above unsafe: 0.1 and 0.2 above four, 0.5 and 0.6 above two each
    assert found["unsafe_text_safe_above_unsafe"].values.tolist() == [12 / 16] * 4


def test_random_embeddings_are_at_chance():
    """Each figure within five standard errors of its chance, over 300 samples whose classes have 3 right items."""
    rows = random_rows(300, 0, 64)
    flags = (torch.rand(2, 300, generator=torch.Generator().manual_seed(1)) < 0.7).long()
    labels = Labels(Contents.distinct(300), *flags, torch.arange(300) // 3)
    for name, metric in retrieval(rows, labels).items():
        error = float(metric.values.double().std()) / len(metric.values) ** 0.5
        # samples share a gallery, and a class its items
        assert abs(metric.mean - metric.chance) <= 5 * 1.8 * error + 0.01 * metric.last, name


def test_chance_is_the_share_of_all_orders():
    for size, wanted, k in itertools.product(range(1, 7), range(0, 7), range(1, 8)):
        if wanted <= size:
            orders = list(itertools.combinations(range(size), min(k, size)))
            hit = sum(any(item < wanted for item in first) for first in orders) / len(orders)
            assert float(any_among(torch.tensor(wanted), size, k)) == pytest.approx(hit, abs=1e-12)
    for size, wanted in ((5, 2), (6, 6), (7, 1)):
        places = [min(drawn) + 1 for drawn in itertools.combinations(range(size), wanted)]
        assert first_place(wanted, size) == pytest.approx(sum(places) / len(places))
    many = any_among(torch.tensor([1, 1_000]), 2_000, 10)
    assert many.tolist() == pytest.approx([10 / 2_000, 1 - math.comb(1_000, 10) / math.comb(2_000, 10)])
