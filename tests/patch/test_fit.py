"""The batches of a patch, the layers that it changes, and the pictures of its pairs."""

import torch

import saferclip_fast as sf
from saferclip_fast.patch.fit import _batches, layers_of, moved


def test_no_row_is_twice_in_a_batch_and_all_come_before_any_comes_again():
    batches = _batches(12, 4, torch.Generator().manual_seed(0))
    for _ in range(3):
        rows = torch.cat([next(batches) for _ in range(3)])
        assert sorted(rows.tolist()) == list(range(12))
    assert sorted(next(_batches(3, 16, torch.Generator())).tolist()) == [0, 1, 2]


def test_pictures_move_a_little_and_their_edges_repeat():
    generator = torch.Generator().manual_seed(0)
    flat = torch.full((3, 3, 32, 32), 0.4)
    moved(flat, generator)
    assert torch.equal(flat, torch.full((3, 3, 32, 32), 0.4))
    dot = torch.zeros(64, 3, 32, 32)
    dot[:, :, 10, 20] = 1
    moved(dot, generator)
    places = {tuple(place) for place in dot[:, 0].nonzero()[:, 1:].tolist()}
    assert {row for row, _ in places} == set(range(8, 13))
    assert {column for _, column in places} == set(range(18, 23)) | set(range(9, 14))  # mirrored: 31 - 20 = 11
    assert dot.sum() == 64 * 3


def test_the_text_encoder_and_the_last_half_of_the_image_encoder_change():
    torch.manual_seed(0)
    names = layers_of(sf.load_clip("RN-small-32"))
    images = [name for name in names if name.startswith("visual.")]
    assert len(images) == 10 and all("layer4" in name or "layer3" in name for name in images[2:])
    assert {name.split(".")[2] for name in names if name not in images} == {"0", "1"}
