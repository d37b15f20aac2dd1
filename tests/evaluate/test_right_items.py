"""A picture with five captions is one picture, and each of its captions is right for it."""

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from saferclip_fast.data.images import ImageArray
from saferclip_fast.data.quadruplets import Quadruplet, QuadrupletDataset, QuadrupletEmbeddings
from saferclip_fast.evaluate import Task
from saferclip_fast.evaluate.metrics import Labels, retrieval
from saferclip_fast.evaluate.right_items import Contents, Right, first_of_each

PICTURES, CAPTIONS = 4, 5


def picture(number):
    return ImageArray(np.full((2, 2, 3), number, np.uint8), f"picture {number}")


def captioned():
    """4 pictures with 5 captions each, as COCO has them; row i + 4 j is caption j of picture i."""
    rows = [(i, j) for j in range(CAPTIONS) for i in range(PICTURES)]
    return [Quadruplet(picture(i), f"caption {j} of {i}", picture(100 + i), f"unsafe {j} of {i}") for i, j in rows]


def perfect():
    safe, unsafe = (side.repeat(CAPTIONS, 1) for side in torch.eye(2 * PICTURES).split(PICTURES))
    noise = 0.01 * torch.randn(len(safe), 2 * PICTURES, generator=torch.Generator().manual_seed(0))
    return QuadrupletEmbeddings(safe + noise, safe, unsafe + noise, unsafe)


def test_perfect_captions_of_one_picture_have_perfect_recall():
    labels = Task(QuadrupletDataset(captioned())).labels
    found = {name: metric.mean for name, metric in retrieval(perfect(), labels).items()}
    for pair in ("S-V", "U-G"):
        assert found[f"{pair}.text_to_image@1"] == found[f"{pair}.image_to_text@1"] == 1
    alone = {name: metric.mean for name, metric in retrieval(perfect(), Labels.default(len(captioned()))).items()}
    assert alone["S-V.text_to_image@1"] == 0.2, "what it was where copies of a picture counted as wrong answers"


def test_copies_of_a_picture_take_one_place():
    """All 4 pictures are among the first 5, where 5 copies of a wrong one stood before."""
    rows = perfect()
    wrong = rows._replace(safe_text=rows.safe_image.roll(1, 0) + 0.5 * rows.safe_image)
    labels = Task(QuadrupletDataset(captioned())).labels
    found = retrieval(wrong, labels)
    assert found["S-V.text_to_image@1"].mean == 0 and found["S-V.text_to_image@5"].mean == 1
    assert found["S-V.text_to_image@1"].chance == 1 / PICTURES


def test_equal_captions_are_right_for_each_others_pictures():
    records = [Quadruplet(picture(i), "a dog", picture(9 + i), f"unsafe {i}") for i in range(2)]
    labels = Task(QuadrupletDataset(records)).labels
    swapped = torch.eye(4)[[1, 0]]
    found = retrieval(QuadrupletEmbeddings(torch.eye(4)[:2], swapped, torch.eye(4)[2:], torch.eye(4)[2:]), labels)
    assert found["S-V.text_to_image@1"].mean == 1
    assert found["U-V.text_to_image@20"].mean == 1 and found["U-V.text_to_image@1"].mean == 0.5, "own pictures alone"


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 12), st.integers(0, 10_000))
def test_right_items_are_those_of_a_common_sample(count, seed):
    generator = torch.Generator().manual_seed(seed)
    asks, shows = torch.randint(0, 5, (2, count), generator=generator)
    right = Right.of(asks, shows)
    everything = torch.arange(count)
    items = everything.expand(count, count)
    expected = [
        [any(asks[r] == asks[i] and shows[r] == shows[j] for r in range(count)) for j in range(count)]
        for i in range(count)
    ]
    assert right.among(everything, items).tolist() == expected
    assert right.how_many(everything, everything).tolist() == [sum(row) for row in expected]
    first = first_of_each(shows)
    assert first.tolist() == [i for i in range(count) if shows[i] not in shows[:i]]


def test_contents_are_numbered_over_both_sides():
    first, second = captioned()[:2]
    both = Quadruplet(second.safe_image, first.unsafe_text, first.safe_image, first.safe_text)
    contents = Contents.of([first, both])
    assert contents.safe_text[0] == contents.unsafe_text[1] and contents.safe_image[0] == contents.unsafe_image[1]
    assert contents.safe_text[1] == contents.unsafe_text[0] != contents.safe_text[0]
