"""Gate 1 for nearest_safe: the .cu source runs on the SIMT executor and finds the exact neighbors."""

import pytest
import torch
import torch.nn.functional as F

from saferclip_fast.ops import reference
from tests.backends.simt import executor as simt

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16


@pytest.fixture(scope="module")
def kernels() -> simt.NearestSafe:
    return simt.NearestSafe()


def rows(count: int, dim: int, dtype=FP32, seed: int = 0) -> torch.Tensor:
    """Unit rows around a common direction, as CLIP embeddings are."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, dim, generator=generator) + 2 * torch.randn(1, dim, generator=generator)
    return F.normalize(x, dim=-1).to(dtype)


def check(kernels, query, bank, k, packed=None) -> simt.Nearest:
    found = kernels(query, bank, k, packed)
    scores, indices = reference.nearest_safe(query, bank, k)
    exact = (F.normalize(query.double(), dim=-1, eps=0.0).nan_to_num(0.0) @ bank.double().T).float()
    chosen = exact.gather(1, found.indices)
    unit = torch.nextafter(scores.abs(), torch.tensor(torch.inf)) - scores.abs()
    assert (found.indices.sort(1).values.diff(dim=1) > 0).all(), "an index appears twice"
    assert ((chosen - scores).abs() <= unit).all(), "a neighbor is missing"
    assert ((found.scores - scores).abs() <= unit).all()
    differs = found.indices != indices  # only where two scores are one fp32 rounding apart
    assert ((chosen - scores).abs()[differs] > 0).all(), "a tie went to the higher index"
    assert differs.float().mean() < 0.02
    return found


@pytest.mark.parametrize(
    ("queries", "count", "dim", "k", "query_type", "bank_type"),
    [
        (5, 300, 64, 1, FP32, FP32),
        (131, 700, 72, 5, BF16, BF16),
        (3, 1000, 100, 32, FP16, FP32),
        (3, 900, 129, 100, FP32, FP16),
        (9, 1029, 776, 1, BF16, FP32),
        (2, 333, 1024, 5, FP32, BF16),
        (7, 1300, 64, 200, FP32, FP32),
        (1, 257, 96, 256, FP16, FP16),
        (4, 1, 64, 1, FP32, FP32),
        (2, 129, 33, 129, BF16, FP16),
    ],
)
def test_exact_neighbors(kernels, queries, count, dim, k, query_type, bank_type):
    query = (rows(queries, dim, seed=1) * 10.0 ** torch.linspace(-3, 3, queries)[:, None]).to(query_type)
    check(kernels, query, rows(count, dim, bank_type, seed=2), k)


@pytest.mark.parametrize("multiprocessors", [1, 4, 64])
def test_split_of_the_bank_does_not_change_the_result(kernels, multiprocessors):
    query, bank = rows(130, 64, seed=3), rows(2100, 64, seed=4)
    expected = kernels(query, bank, 5)
    kernels.multiprocessors = multiprocessors
    try:
        found = check(kernels, query, bank, 5)
    finally:
        kernels.multiprocessors = 2
    assert found.indices.equal(expected.indices)
    assert found.scores.equal(expected.scores)


def test_many_queries_go_a_wave_at_a_time(kernels):
    kernels.multiprocessors = 1  # a wave is two blocks of 128 queries
    try:
        check(kernels, rows(300, 64, seed=3), rows(200, 64, seed=4), 2)
    finally:
        kernels.multiprocessors = 2


@pytest.mark.parametrize("bank_type", [FP32, FP16])
def test_packed_bank(kernels, bank_type):
    query, bank = rows(6, 80, seed=5), rows(600, 80, bank_type, seed=6)
    packed = kernels.pack(bank)
    check(kernels, query, bank, 3, packed)


def test_foreign_blob_is_not_trusted(kernels):
    """A blob without the header is ignored: every row is scored exactly instead."""
    query, bank = rows(3, 64, seed=5), rows(400, 64, seed=6)
    packed = torch.full_like(kernels.pack(bank), 7)
    check(kernels, query, bank, 3, packed)


@pytest.mark.parametrize("bank_type", [FP32, BF16])
def test_equal_rows_and_full_lists(kernels, bank_type):
    """All rows within the bound of each other: the lists overflow, and ties still go to the lower index."""
    bank = rows(1, 64, bank_type, seed=7).repeat(1700, 1)
    bank[900:] = rows(1, 64, bank_type, seed=8)
    query = rows(4, 64, seed=9)
    for k in (1, 40, 256):
        check(kernels, query, bank, k)


def test_rounding_hides_the_best_row(kernels):
    """In fp16 the best row scores below others: only the proven bound, here attained, keeps it."""
    step = 2.0**-11  # spacing of fp16 numbers at 0.75
    bank = torch.full((300, 64), 0.5)
    bank[:9, 1:] = 0.75
    bank[:9, 1:21] += step  # exact in fp16: 20 steps along the query
    bank[290, 1:] = 0.75 + 0.45 * step  # rounds to 0.75, but is 28 steps along the query
    bank[:, 0] = 1
    query = torch.ones(1, 64)
    query[0, 0] = 0
    assert check(kernels, query, bank, 1).indices.tolist() == [[290]]


def test_near_duplicates(kernels):
    """Scores closer than the screen can tell apart are ordered exactly."""
    generator = torch.Generator().manual_seed(0)
    bank = rows(1, 128, seed=1) + 1e-5 * torch.randn(700, 128, generator=generator)
    check(kernels, rows(3, 128, seed=2), bank, 10)


def test_rows_of_any_scale(kernels):
    bank = rows(600, 64, seed=1) * 10.0 ** torch.linspace(-38, 30, 600)[:, None]
    query = rows(4, 64, seed=2) * torch.tensor([1e-30, 1e-3, 1.0, 1e30])[:, None]
    query[3] = -query[3]
    check(kernels, query, bank, 5)


def test_zero_rows(kernels):
    query, bank = rows(3, 64, seed=1), rows(300, 64, seed=2)
    query[1], bank[::3] = 0, 0
    found = check(kernels, query, bank, 4)
    assert found.indices[1].tolist() == [0, 1, 2, 3]
    assert found.scores[1].tolist() == [0, 0, 0, 0]


def test_nan_stays_in_its_row(kernels):
    """With the check turned off a NaN must not lead out of bounds, nor into other queries."""
    query, bank = rows(3, 64, seed=1), rows(300, 64, seed=2)
    query[1, 5] = torch.nan
    found = kernels(query, bank, 3)
    _, indices = reference.nearest_safe(query[[0, 2]], bank, 3)
    assert found.indices[[0, 2]].equal(indices)
    assert found.scores[1].isnan().all()
    assert found.indices[1].tolist() == [0, 1, 2]


def test_unaligned_tensor(kernels):
    """A view that starts off a 16-byte boundary takes the scalar loads."""
    bank = rows(300, 64, BF16, seed=1).flatten()
    shifted = torch.empty(bank.numel() + 1, dtype=BF16)
    shifted[1:] = bank
    check(kernels, rows(3, 64, seed=2), shifted[1:].view(300, 64), 2)
