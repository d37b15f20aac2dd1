"""Every metric on embeddings whose answers are known."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from saferclip_fast.data.quadruplets import QuadrupletEmbeddings
from saferclip_fast.evaluate.metrics import (
    Labels,
    caption_bank_hits,
    drift,
    label_combinations,
    retrieval,
    zero_shot_hits,
)
from saferclip_fast.evaluate.right_items import Contents

EYE = torch.eye(6)
SAFE, UNSAFE = EYE[:3], EYE[3:]


def means(rows, labels=None):
    return {name: metric.mean for name, metric in retrieval(rows, labels).items()}


def test_nobody_should_find_more_unsafe_items():
    metrics = retrieval(QuadrupletEmbeddings(SAFE, SAFE, UNSAFE, UNSAFE))
    unsafe = {name: metric.wanted for name, metric in metrics.items() if "finds_unsafe" in name or "share" in name}
    assert len(unsafe) == 36 and set(unsafe.values()) == {"falls"}  # 4 queries x (4 depths x 2, and R)


def test_a_frozen_model_finds_what_the_text_names():
    found = means(QuadrupletEmbeddings(SAFE, SAFE, UNSAFE, UNSAFE))
    assert found["unsafe_text_finds_unsafe_image@1"] == found["unsafe_image_finds_unsafe_text@1"] == 1
    assert found["unsafe_text_finds_right_image@1"] == found["unsafe_image_finds_right_text@1"] == 0
    assert found["safe_text_finds_unsafe_image@1"] == found["safe_image_finds_unsafe_text@1"] == 0
    for pair in ("S-V", "U-G"):
        assert found[f"{pair}.text_to_image@1"] == found[f"{pair}.image_to_text@1"] == 1
    # all cosines are 0: ties go to the first row
    assert found["U-V.text_to_image@1"] == found["S-G.image_to_text@1"] == pytest.approx(1 / 3)


def test_a_redirected_model_finds_the_safe_item():
    # unsafe texts sit on their safe ones; unsafe images stay where they were
    found = means(QuadrupletEmbeddings(SAFE, SAFE, SAFE, UNSAFE))
    assert found["unsafe_text_finds_unsafe_image@1"] == 0
    assert found["unsafe_text_finds_right_image@1"] == 1
    assert found["U-V.text_to_image@1"] == found["U-V.image_to_text@1"] == 1


def test_the_wrong_safe_item_is_not_right_unless_it_has_the_label():
    rolled = QuadrupletEmbeddings(SAFE, SAFE, SAFE.roll(1, 0), UNSAFE)
    same = Labels.default(3)._replace(classes=torch.tensor([7, 7, 7]))
    assert means(rolled)["unsafe_text_finds_right_image@1"] == 0
    assert means(rolled, same)["unsafe_text_finds_right_image@1"] == 1
    assert means(rolled)["unsafe_text_finds_unsafe_image@1"] == 0


def test_cutoffs_count_any_and_share():
    # one query; by cosine its gallery is: safe 0 (wrong), unsafe 0, safe 1 (wrong), unsafe 1, ..., its own last
    count = 12
    angles = torch.linspace(0.01, 1.5, 2 * count)
    images = torch.stack([angles.cos(), angles.sin()], 1)
    safe_image, unsafe_image = images[0::2], images[1::2]
    text = torch.tensor([[1.0, 0.0]]).expand(count, 2)
    found = retrieval(QuadrupletEmbeddings(text, safe_image, text, unsafe_image))
    last = {name: float(metric.values[-1]) for name, metric in found.items() if name.startswith("unsafe_text")}
    assert [last[f"unsafe_text_finds_unsafe_image@{k}"] for k in (1, 5, 10, 20)] == [0, 1, 1, 1]
    assert [last[f"unsafe_text_unsafe_share@{k}"] for k in (1, 5, 10, 20)] == pytest.approx([0, 0.4, 0.5, 0.5])
    third = {name: float(metric.values[2]) for name, metric in found.items()}
    assert [third[f"unsafe_text_finds_right_image@{k}"] for k in (1, 5, 10, 20)] == [0, 1, 1, 1]
    # among safe images alone, sample 11's own is the twelfth
    assert [float(found[f"U-V.text_to_image@{k}"].values[11]) for k in (1, 5, 10, 20)] == [0, 0, 0, 1]


def test_what_is_labeled_safe_neither_asks_nor_counts_as_unsafe():
    # sample 0's generated image is labeled safe, sample 1's text is
    labels = Labels(Contents.distinct(3), torch.tensor([1, 0, 1]), torch.tensor([0, 1, 1]))
    rows = QuadrupletEmbeddings(SAFE, SAFE, UNSAFE, UNSAFE)
    found = retrieval(rows, labels)
    assert found["unsafe_text_finds_unsafe_image@1"].values.tolist() == [0, 1]  # samples 0 and 2
    assert found["unsafe_text_finds_right_image@1"].values.tolist() == [1, 0]
    assert len(found["U-G.text_to_image@1"].values) == 1  # only sample 2 is unsafe on both sides
    frozen = rows._replace(unsafe_text=UNSAFE.roll(1, 0))
    table = label_combinations(rows, frozen, labels)
    assert set(table) == {(1, 0), (0, 1), (1, 1)}
    assert table[1, 0]["text_finds_unsafe_image@1"].mean == 0 and table[1, 0]["image_cosine_to_frozen"].mean == 1
    assert table[0, 1]["text_finds_unsafe_image@1"].mean == 1 and table[0, 1]["text_cosine_to_frozen"].mean == 0
    assert table[0, 1]["text_cosine_to_frozen"].wanted == "stays"
    everything_safe = Labels(Contents.distinct(3), torch.zeros(3).long(), torch.zeros(3).long())
    assert not any(name.startswith("unsafe") for name in retrieval(rows, everything_safe))


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 30), st.integers(2, 8), st.integers(0, 1_000))
def test_the_order_of_the_samples_does_not_matter(count, width, seed):
    generator = torch.Generator().manual_seed(seed)
    classes = torch.randint(0, count, (count,), generator=generator) if seed % 2 else None
    contents = Contents.distinct(count)
    if classes is None:  # what is equal is on one side, since a safe item that ties with an unsafe one has no order
        safe, unsafe = (torch.randint(0, count, (2, count), generator=generator) for _ in range(2))
        contents = Contents(*safe, *unsafe + count)
    texts, images = torch.randn(2, 2 * count, width, generator=generator)
    rows = QuadrupletEmbeddings(*(side[n] for side, n in zip((texts, images) * 2, contents, strict=True)))
    flags = torch.randint(0, 2, (2, 2 * count), generator=generator)
    labels = Labels(contents, flags[0][contents.unsafe_text], flags[1][contents.unsafe_image], classes)
    order = torch.randperm(count, generator=generator)
    shuffled = QuadrupletEmbeddings(*(side[order] for side in rows))
    before, after = means(rows, labels), means(shuffled, reordered(labels, order))
    assert after == pytest.approx(before)


def reordered(labels, order):
    contents = Contents(*(numbers[order] for numbers in labels.contents))
    classes = None if labels.classes is None else labels.classes[order]
    return Labels(contents, labels.text_is_unsafe[order], labels.image_is_unsafe[order], classes)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 25), st.integers(0, 1_000))
def test_recall_grows_with_k_and_unsafe_never_counts_as_right(count, seed):
    generator = torch.Generator().manual_seed(seed)
    rows = QuadrupletEmbeddings(*(torch.randn(count, 4, generator=generator) for _ in range(4)))
    found = means(rows)
    for name in {name.split("@")[0] for name in found if "@" in name and "share" not in name}:
        values = [found[f"{name}@{k}"] for k in (1, 5, 10, 20)]
        assert values == sorted(values) and 0 <= values[0] <= values[-1] <= 1
    assert found["unsafe_text_finds_unsafe_image@1"] + found["unsafe_text_finds_right_image@1"] <= 1 + 1e-9


def test_zero_shot_accuracy_caption_bank_and_drift():
    labels = torch.tensor([0, 1, 1])
    assert zero_shot_hits(2 * SAFE, labels, SAFE).tolist() == [1, 1, 0]
    hits = caption_bank_hits(
        SAFE, 3 * torch.cat([SAFE[:2], UNSAFE + SAFE]), torch.tensor([False, False, True, True, True])
    )
    assert hits.tolist() == [0, 0, 1]
    moved = QuadrupletEmbeddings(SAFE, SAFE.roll(1, 0), UNSAFE, UNSAFE)
    frozen = QuadrupletEmbeddings(SAFE, SAFE, UNSAFE, UNSAFE)
    assert {name: m.mean for name, m in drift(moved, frozen).items()} == {
        "safe_text_cosine_to_frozen": 1.0,
        "safe_image_cosine_to_frozen": 0.0,
    }
