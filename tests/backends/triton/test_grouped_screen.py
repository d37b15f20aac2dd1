"""The screen of groups returns the reference's indices and scores, and reads what the CUDA kernels pack."""

import pytest
import torch

from benchmarks.gpu import roofline
from saferclip_fast.ops.triton import configs, grouped_screen, nearest_safe
from tests.backends.simt import executor as simt

from .device import DEVICE
from .test_nearest_safe import BF16, F16, F32, OP, assert_exact, rows, searched_again, unit_rows  # noqa: F401

INTERPRETED = DEVICE == "cpu"


def take_groups(monkeypatch):
    """Every search through the screen of groups, whatever the chip and the size."""
    if INTERPRETED:
        monkeypatch.setattr(configs, "has_wide_tiles", lambda device: True)
    for name in ("GROUPED_QUERIES", "GROUPED_ROWS", "GROUPED_ROWS_A_NEIGHBOR"):
        monkeypatch.setattr(configs, name, 1)


@pytest.fixture(autouse=True)
def groups(monkeypatch):
    take_groups(monkeypatch)
    if not configs.takes_groups(rows(1, 8), unit_rows(1, 8), 1):
        pytest.skip("this GPU has neither wgmma nor tcgen05")


def pack(bank):
    """What `SafeBank.pack` makes on a GPU, made by the CUDA kernel on the executor."""
    return simt.NearestSafe().pack(bank.cpu()).to(DEVICE)


@pytest.mark.parametrize(
    ("queries", "bank_rows", "width", "k", "query_dtype", "bank_dtype"),
    [
        (1, 1, 8, 1, F32, F32),
        (2, 9, 8, 9, F32, F32),  # k = N, less than a tile
        (17, 64, 24, 1, F32, F32),  # one whole tile, two blocks of queries
        (19, 205, 40, 3, BF16, BF16),  # 16-bit banks are read as they are
        (3, 300, 72, 32, F16, F16),
        (2, 333, 136, 7, F32, BF16),  # the query is rounded to the bank's dtype
        (2, 300, 40, 2, BF16, F32),
        (2, 250, 16, 60, F32, F32),
        (1, 260, 16, 256, BF16, BF16),
    ],
)
def test_same_as_the_reference(queries, bank_rows, width, k, query_dtype, bank_dtype):
    assert_exact(rows(queries, width, query_dtype, scale=3), unit_rows(bank_rows, width, bank_dtype), k)


@pytest.mark.parametrize(("width", "dtype"), [(33, F32), (12, BF16)])
def test_widths_that_tma_does_not_take_go_the_other_way(width, dtype, monkeypatch):
    monkeypatch.setattr(nearest_safe, "screen_and_score", None)
    assert_exact(rows(2, width, dtype), unit_rows(70, width, dtype), 2)


def test_which_searches_it_takes(monkeypatch):
    monkeypatch.undo()
    query, bank = rows(300, 16, BF16), unit_rows(5000, 16, BF16)
    wide = configs.has_wide_tiles(query.device)
    assert configs.takes_groups(query, bank, 1) == wide
    monkeypatch.setattr(configs, "has_wide_tiles", lambda device: True)
    assert configs.takes_groups(query, bank, 39)
    assert not configs.takes_groups(query, bank, 40)  # too few groups for so many neighbors
    assert not configs.takes_groups(query[:256], bank, 1)
    assert not configs.takes_groups(query, bank[:4095], 1)
    assert not configs.takes_groups(query[:, :12], bank[:, :12].contiguous(), 1)
    assert not configs.takes_groups(query, bank.flatten()[3 : 3 + 4999 * 16].view(4999, 16), 1)  # not aligned
    monkeypatch.setattr(configs, "GROUPED_MOST_ROWS", 4999)
    assert not configs.takes_groups(query, bank, 1)


def test_the_usual_query_is_proven_at_once(searched_again):  # noqa: F811
    assert_exact(rows(3, 64), unit_rows(300, 64), 4)
    assert searched_again == [0]


def test_packed_banks_of_the_cuda_kernels_are_read(monkeypatch):
    query, bank = rows(4, 40), unit_rows(150, 40) * torch.logspace(-3, 2, 150, device=DEVICE)[:, None]
    expected = OP(query, bank, 3)
    packed = pack(bank)
    monkeypatch.setattr(grouped_screen, "copy_kernel", None)  # no other copy is made
    assert all(torch.equal(a, b) for a, b in zip(OP(query, bank, 3, packed), expected, strict=True))


def test_a_blob_of_the_same_size_that_is_no_packed_bank(searched_again):  # noqa: F811
    query, bank = rows(2, 16), unit_rows(70, 16)
    packed = pack(bank.flip(0))
    packed[:8] = 0
    scores, indices = OP(query, bank, 2, packed)
    expected = OP(query, bank, 2)
    assert torch.equal(indices, expected[1])
    assert torch.equal(scores, expected[0])
    assert searched_again == [2, 0]


def test_another_blob_is_not_read():
    query, bank = rows(2, 16), unit_rows(70, 16)
    expected = OP(query, bank, 2)
    got = OP(query, bank, 2, torch.zeros(999, dtype=torch.uint8, device=DEVICE))
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("k", [1, 6])
def test_rows_closer_than_the_screen_can_tell(dtype, k, searched_again):  # noqa: F811
    """20 rows within the screen's error of each other, some in one group: only float64 orders them."""
    base, noise = unit_rows(1, 96, seed=5), unit_rows(160, 96, seed=6)
    bank = noise.clone()
    bank[50:70] = base + 3e-5 * noise[50:70]
    assert_exact(rows(1, 96, dtype, seed=9).add(4 * base).to(dtype), bank.to(dtype), k)
    assert searched_again == [0]  # their groups fit a list


def one_sided():
    """A query and a bank whose best row, 3, the copy rounds down everywhere, and whose second best, 12, up."""
    step = 2.0**-12  # half of float16's spacing in [0.5, 1)
    bank = 0.3 * unit_rows(70, 32)
    bank[[3, 12]] = 0.5 + torch.tensor([[0.9], [1.1]], device=DEVICE) * step
    bank[[3, 12], :2] = torch.tensor([[1.0, 0.75], [1.0, 0.75 - 8 * step]], device=DEVICE)
    return torch.ones(1, 32, device=DEVICE), bank


def test_roundings_that_all_fall_to_one_side():
    query, bank = one_sided()
    assert_exact(query, bank, 1)
    assert OP(query, bank, 1)[1] == 3


def test_equal_scores_give_the_lower_index():
    bank = unit_rows(200, 32)
    bank[100:106] = bank[100]
    bank[160:175] = bank[100]
    assert_exact(torch.cat([bank[100:101] * 2, bank[5:6], -bank[100:101]]), bank, 3)
    assert_exact(bank[100:101], bank, 20)


@pytest.mark.parametrize("bank_rows", [70, 150])
def test_all_rows_equal(bank_rows, searched_again):  # noqa: F811
    """70 are all scored; 150 are more than a list holds here."""
    bank = unit_rows(1, 8).repeat(bank_rows, 1)
    assert_exact(rows(1, 8), bank, 3)
    assert searched_again == [0 if bank_rows == 70 or not INTERPRETED else 1]


def test_rows_that_score_less_than_what_is_beyond_the_end():
    """All scores are negative, and the last tile has only one row: x is 0 beyond it."""
    bank = unit_rows(193, 24).abs()
    assert_exact(-bank[[192, 0, 70]], bank, 2)
    bank[:192] *= 100
    assert_exact(-rows(3, 24).abs(), bank, 1)  # row 192 wins


def test_zero_queries_score_zero_on_the_first_rows():
    query = rows(3, 16)
    query[1] = 0
    assert_exact(query, unit_rows(130, 16), 4)


@pytest.mark.parametrize("scale", [1e-30, 1e25])
def test_query_of_any_scale(scale):
    assert_exact(rows(3, 24, scale=scale), unit_rows(100, 24), 3)


@pytest.mark.parametrize("dtype", [F32, F16])
def test_bank_rows_of_any_length(dtype):
    bank = unit_rows(300, 24) * torch.logspace(-6, 3, 300, device=DEVICE)[torch.randperm(300), None]
    bank[17] = 0
    assert_exact(rows(3, 24), bank.to(dtype), 4)


def test_float16_bank_with_subnormal_numbers():
    assert_exact(rows(2, 40), (unit_rows(200, 40) * 1e-5).to(F16), 3)


def test_products_beyond_float32_are_searched_again(searched_again):  # noqa: F811
    bank = unit_rows(70, 16)
    bank[3] *= 3e38
    assert_exact(rows(2, 16), bank.to(BF16), 2)
    assert searched_again == [2]


def test_non_finite_input_ends_with_indices_in_range():
    query, bank = rows(3, 16), unit_rows(70, 16)
    query[0, 0], query[1, 3], bank[7, 2], bank[9, 1] = torch.nan, torch.inf, torch.nan, -torch.inf
    _, indices = OP(query, bank, 3)
    assert ((indices >= 0) & (indices < 70)).all()


def test_no_query():
    scores, indices = OP(rows(0, 8), unit_rows(10, 8), 2)
    assert scores.shape == indices.shape == (0, 2)


def test_parts_of_the_batch_change_nothing(monkeypatch):
    query, bank = rows(9, 16), unit_rows(100, 16)
    expected = OP(query, bank, 2)
    monkeypatch.setattr(nearest_safe, "most_queries", lambda bank_rows: 4)
    assert all(torch.equal(a, b) for a, b in zip(OP(query, bank, 2), expected, strict=True))


@pytest.mark.parametrize("bank_rows", [4096, 100_000, 1 << 22])
def test_the_groups_values_fit_their_workspace(bank_rows):
    most = grouped_screen.most_queries(bank_rows)
    groups = -(-bank_rows // configs.GROUPED.kwargs["BLOCK_COLUMNS"]) * grouped_screen.LANES.value
    assert most == grouped_screen.FEWEST or most * groups * 8 <= grouped_screen.WORKSPACE
    assert most >= grouped_screen.FEWEST


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_every_group_is_within_the_bound(dtype, monkeypatch):
    """Best and second of each group against float64, and the row that the best names."""
    seen = {}
    kernel = grouped_screen.candidates_kernel

    class Spy:
        def __getitem__(self, grid):
            def launch(*arguments, **constants):
                seen.update(zip(kernel.arg_names, arguments, strict=False), **constants)
                kernel[grid](*arguments, **constants)

            return launch

    monkeypatch.setattr(grouped_screen, "candidates_kernel", Spy())
    query, bank = rows(5, 48), (unit_rows(150, 48) * torch.linspace(0.1, 3, 150, device=DEVICE)[:, None]).to(dtype)
    OP(query, bank, 1)
    norm = query.double().norm(dim=1)
    exact = (query.double() / norm.log2().floor().exp2()[:, None]) @ bank.double().T
    error = seen["errors"].max()
    c = seen["slack"] * seen["squares"].max().sqrt() + error * (seen["length"] + seen["slack"])
    tile, members = seen["MEMBERS"] * 8, seen["MEMBERS"]
    best, second = seen["best"], seen["second"]
    assert (error > 0) == (dtype == F32)
    assert float((c / (seen["length"] * bank.float().norm(dim=1).max())).max()) < 2e-3 + 8e-3 * (dtype == BF16)
    for group in range(150 // tile * 8):
        own = group // 8 * tile + group % 8 + 8 * torch.arange(members, device=DEVICE)
        two = exact[:, own].topk(2, dim=1).values
        assert ((best[:, group] - two[:, 0]).abs() <= c).all()
        assert ((second[:, group] - two[:, 1]).abs() <= c).all()
        named = own[best[:, group].contiguous().view(torch.int32).long() & (members - 1)]
        assert ((exact.gather(1, named[:, None])[:, 0] - best[:, group]).abs() <= c).all()


@pytest.mark.skipif(not INTERPRETED, reason="counts products in the interpreter")
def test_every_product_is_made_once(monkeypatch):
    from triton.runtime import interpreter

    counted, dot = [], interpreter.InterpreterBuilder.create_dot

    def count(self, a, b, *rest):
        counted.append(a.data.shape[0] * a.data.shape[1] * b.data.shape[1])
        return dot(self, a, b, *rest)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", count)
    queries, bank_rows, width = 20, 130, 40
    assert_exact(rows(queries, width), unit_rows(bank_rows, width), 2)
    assert sum(counted) == roofline.group_products(queries, bank_rows, width, configs.GROUPED_TILE)
    assert roofline.group_products(4096, 100_096, 768) == 4096 * 100_096 * 768
