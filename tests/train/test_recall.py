"""Recall of validation rows: who finds whom first."""

import torch

from saferclip_fast.data.quadruplets import QuadrupletEmbeddings
from saferclip_fast.runtime.ranks import Ranks
from saferclip_fast.train.recall import recall, recalls
from tests.train.conftest import validations

TEXT, WORDS = torch.eye(4), torch.arange(4).unsqueeze(1)
SWAPPED = TEXT[[0, 1, 3, 2]]  # two pairs are exchanged


def test_pairs_that_find_each_other():
    assert recall(TEXT, SWAPPED, WORDS, Ranks()) == 0.5 and recall(TEXT, 3 * TEXT, WORDS, Ranks()) == 1.0


def test_captions_of_the_same_words_have_each_others_images():
    assert recall(TEXT, SWAPPED, WORDS // 2, Ranks()) == 1.0


def test_the_sum_counts_redirected_pairs():
    def found(unsafe_text, unsafe_image, safe_words, unsafe_words):
        rows = QuadrupletEmbeddings(TEXT, TEXT, unsafe_text, unsafe_image)
        parts = [QuadrupletEmbeddings(*(side[part] for side in rows)) for part in (slice(3), slice(3, 4))]
        words = [(safe_words[part], unsafe_words[part]) for part in (slice(3), slice(3, 4))]
        return recalls(parts, words, Ranks())

    assert found(TEXT, SWAPPED, WORDS, WORDS) == {"recall": 1.0, "recall_sum": 2 * (1 + 0.5 + 1)}
    assert found(SWAPPED, TEXT, WORDS, WORDS // 2)["recall_sum"] == 2 * (1 + 1 + 1)
    assert found(SWAPPED, TEXT, WORDS // 2, WORDS)["recall_sum"] == 2 * (1 + 1 + 0.5)


def test_a_run_logs_both(undisturbed):
    assert all(0 <= line["recall"] <= 1 and 0 <= line["recall_sum"] <= 6 for line in validations(undisturbed))
