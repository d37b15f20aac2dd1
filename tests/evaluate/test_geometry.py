"""Spread and neighbors against the frozen model's: rotations, collapses and shuffles of known value."""

import math

import pytest
import torch
import torch.nn.functional as F

from saferclip_fast.data.quadruplets import QuadrupletEmbeddings
from saferclip_fast.evaluate.geometry import NEIGHBORS, geometry
from saferclip_fast.evaluate.right_items import Contents


def means(now, frozen, contents=None):
    sides = (QuadrupletEmbeddings(rows, rows, rows, rows) for rows in (now, frozen))
    return {name: metric.mean for name, metric in geometry(*sides, contents).items()}


def cone(angle, count=70):
    """Unit rows at `angle` from an axis, each in a direction of its own: the spread is sin^2(angle) (1 - 1/count)."""
    return torch.cat([torch.full((count, 1), math.cos(angle)), math.sin(angle) * torch.eye(count)], 1)


def test_a_rotation_changes_nothing():
    rows = torch.randn(70, 8, generator=torch.Generator().manual_seed(0))
    rotation = torch.linalg.qr(torch.randn(8, 8, generator=torch.Generator().manual_seed(1)))[0]
    found = means(3 * rows @ rotation, rows)
    assert found.keys() == {
        f"safe_{m}_{f}" for m in ("text", "image") for f in ("spread_ratio", "neighbors_kept")
    } and found == pytest.approx(dict.fromkeys(found, 1.0), abs=1e-5)


def test_a_narrower_cone_has_the_known_spread():
    found = means(cone(0.2), cone(0.8))
    assert found["safe_text_spread_ratio"] == pytest.approx((math.sin(0.2) / math.sin(0.8)) ** 2, rel=1e-4)


def test_a_collapse_has_no_spread():
    assert means(torch.ones(70, 8), cone(0.8)[:, :8])["safe_image_spread_ratio"] == pytest.approx(0, abs=1e-6)


def test_neighbors_are_those_of_a_plain_search():
    rows = torch.randn(2, 80, 6, generator=torch.Generator().manual_seed(2))
    sets = []
    for side in rows.double():
        unit = F.normalize(side, dim=1)
        scores = (unit @ unit.T).fill_diagonal_(-2)
        sets.append([set(row.tolist()) for row in scores.topk(NEIGHBORS).indices])
    expected = sum(len(a & b) / len(a | b) for a, b in zip(*sets, strict=True)) / 80
    assert means(*rows)["safe_text_neighbors_kept"] == pytest.approx(expected, abs=1e-6)
    assert 0.1 < expected < 0.5, "the case tells something"


def test_more_equal_rows_than_neighbors_keep_their_places():
    rows = torch.cat([torch.ones(70, 4), torch.eye(4)])
    assert means(rows, rows)["safe_text_neighbors_kept"] == 1


def test_equal_captions_count_once():
    rows = torch.randn(70, 4, generator=torch.Generator().manual_seed(3))
    twice = rows.repeat_interleave(2, 0)
    numbers = torch.arange(70).repeat_interleave(2)
    contents = Contents(numbers, numbers, numbers + 70, numbers + 70)
    other = torch.randn(70, 4, generator=torch.Generator().manual_seed(4))
    assert means(twice, other.repeat_interleave(2, 0), contents) == pytest.approx(means(rows, other))


def test_the_frozen_model_beside_itself_is_sure():
    rows = torch.randn(2, 20, 8, generator=torch.Generator().manual_seed(5))
    sides = [QuadrupletEmbeddings(x, x, x, x) for x in rows]
    assert geometry(sides[0], sides[0])["safe_text_spread_ratio"].values == pytest.approx(torch.ones(20), abs=1e-5)
    found = geometry(sides[1], sides[0])
    assert "safe_text_neighbors_kept" not in found, "of 19 others, 15 are neighbors whatever the model"
    d, d0 = ((F.normalize(x, dim=1) - F.normalize(x, dim=1).mean(0)).square().sum(1) for x in (rows[1], rows[0]))
    assert found["safe_text_spread_ratio"].mean == pytest.approx(float(d.mean() / d0.mean()))


def test_two_items_have_no_geometry():
    assert means(torch.eye(2), torch.eye(2)) == {}
