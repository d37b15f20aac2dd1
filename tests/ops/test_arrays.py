"""NumPy arrays and single queries: the answer of the tensors, in kind."""

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

import saferclip_fast as sf

ROWS, D, K = 60, 24, 5


@pytest.fixture
def pairs() -> torch.Tensor:
    return torch.randn(2, ROWS, D, generator=torch.Generator().manual_seed(3))


@pytest.fixture
def query() -> torch.Tensor:
    return torch.randn(7, D, generator=torch.Generator().manual_seed(4))


def assert_same_numbers(found, wanted):
    for array, tensor in zip(found, wanted, strict=True):
        assert isinstance(array, np.ndarray) and np.array_equal(array, tensor.numpy())


FORMS = {
    "as it is": lambda x: x,
    "read-only": lambda x: np.frombuffer(x.tobytes(), x.dtype).reshape(x.shape),
    "Fortran order": np.asfortranarray,
    "backwards": lambda x: x[::-1].copy()[::-1],
    "big-endian": lambda x: x.astype(x.dtype.newbyteorder(">")),
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_arrays_are_answered_with_arrays(pairs, query, form, dtype):
    text, image, queries = (FORMS[form](x.numpy().astype(dtype)) for x in (*pairs, query))
    kept = [x.copy() for x in (text, image, queries)]
    tensors = [torch.from_numpy(x.numpy().astype(dtype)) for x in (*pairs, query)]
    bank, wanted = sf.SafeBank(text, image), sf.SafeBank(*tensors[:2])
    assert torch.equal(bank.text, wanted.text) and torch.equal(bank.image, wanted.image)
    assert_same_numbers(sf.nearest_safe(queries, bank, K), sf.nearest_safe(tensors[2], wanted, K))
    assert_same_numbers(sf.nearest_safe(queries, bank.text.numpy(), K), sf.nearest_safe(tensors[2], wanted, K))
    assert all(np.array_equal(a, b) for a, b in zip(kept, (text, image, queries), strict=True))


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_a_single_query_gets_a_single_answer(pairs, query, backend):
    bank = sf.SafeBank(*pairs).pack()
    found = sf.nearest_safe(query[2], bank, K, backend=backend)
    wanted = sf.nearest_safe(query[2:3], bank, K, backend=backend)
    assert found.scores.shape == found.indices.shape == (K,)
    assert torch.equal(found.scores, wanted.scores[0]) and torch.equal(found.indices, wanted.indices[0])
    assert_same_numbers(sf.nearest_safe(query[2].numpy(), bank, K, backend=backend), found)


def test_a_bank_is_searched_by_its_texts_or_by_its_images(pairs, query):
    bank = sf.SafeBank(*pairs).pack()
    for modality, rows in zip(("text", "image"), pairs, strict=True):
        found = bank.search(query, K, modality=modality)
        scores = normalize(query.double(), dim=1) @ normalize(rows.double(), dim=1).T
        assert torch.equal(found.indices, scores.topk(K).indices)
    assert_same_numbers(bank.search(query.numpy(), K), bank.nearest(query, K))
    assert bank.search(query[0], modality="image").indices.shape == (1,)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"modality": "images"}, ValueError, "modality='images' must be 'text' or 'image'"),
        ({"query": np.ones((2, 3, D), np.float32)}, ValueError, r"query must have shape \[rows, d\], got \(2, 3, 24\)"),
        ({"query": np.ones((2, D), np.int64)}, ValueError, "query must be float64, float32"),
        ({"query": np.ones(D + 1, np.float32)}, ValueError, "query has d=25|has d=24 but query has d=25"),
        ({"query": np.full(D, np.nan, np.float32)}, ValueError, "query holds NaN or Inf"),
        ({"query": [1.0] * D}, TypeError, "query must be a torch.Tensor, got list"),
    ],
)
def test_what_is_no_query_is_named(pairs, query, change, error, message):
    with pytest.raises(error, match=message):
        sf.SafeBank(*pairs).search(**({"query": query} | change))
