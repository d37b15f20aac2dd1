"""Retrieval, zero-shot accuracy and drift on embeddings whose answers are known."""

import torch

from saferclip_fast.evaluate import drift, retrieval, zero_shot_accuracy
from saferclip_fast.objectives import QuadrupletEmbeddings

EYE = torch.eye(6)
SAFE, UNSAFE = EYE[:3], EYE[3:]


def test_a_frozen_model_finds_what_the_text_names():
    found = retrieval(QuadrupletEmbeddings(SAFE, SAFE, UNSAFE, UNSAFE))
    assert found["unsafe_text_to_unsafe_image_rate"] == found["unsafe_image_to_unsafe_text_rate"] == 1
    assert found["unsafe_text_to_safe_image_r1"] == found["unsafe_image_to_safe_text_r1"] == 0
    assert found["safe_text_to_safe_image_r1"] == found["safe_image_to_safe_text_r1"] == 1


def test_a_redirected_model_finds_the_safe_item():
    # unsafe texts sit on their safe ones; unsafe images stay where they were
    found = retrieval(QuadrupletEmbeddings(SAFE, SAFE, SAFE, UNSAFE))
    assert found["unsafe_text_to_unsafe_image_rate"] == 0
    assert found["unsafe_text_to_safe_image_r1"] == 1


def test_the_wrong_safe_item_is_not_right_unless_it_has_the_label():
    rolled = QuadrupletEmbeddings(SAFE, SAFE, SAFE.roll(1, 0), UNSAFE)
    assert retrieval(rolled)["unsafe_text_to_safe_image_r1"] == 0
    assert retrieval(rolled, torch.tensor([7, 7, 7]))["unsafe_text_to_safe_image_r1"] == 1
    assert retrieval(rolled)["unsafe_text_to_unsafe_image_rate"] == 0


def test_zero_shot_accuracy_and_drift():
    labels = torch.tensor([0, 1, 1])
    assert zero_shot_accuracy(2 * SAFE, labels, SAFE) == 2 / 3
    moved = QuadrupletEmbeddings(SAFE, SAFE.roll(1, 0), UNSAFE, UNSAFE)
    frozen = QuadrupletEmbeddings(SAFE, SAFE, UNSAFE, UNSAFE)
    assert drift(moved, frozen) == {"safe_text_cosine_to_frozen": 1.0, "safe_image_cosine_to_frozen": 0.0}
