"""The same checks as gate 1 on a real GPU, and what only a GPU can show. `make gpu-check` runs them."""

import pytest
import torch
import torch.nn.functional as F

import saferclip_fast as sf
from saferclip_fast.ops import reference
from tests.backends.cuda import test_nearest_safe as searches
from tests.backends.cuda import test_preservation_loss as preservation
from tests.backends.cuda import test_retarget_loss as retarget
from tests.backends.simt.executor import Nearest

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
DTYPES = [FP32, BF16, FP16]
OPS = torch.ops.saferclip_fast

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU: run `make gpu-check` on one"),
]


def to_gpu(arguments):
    return [a.cuda() if isinstance(a, torch.Tensor) else a for a in arguments]


class GpuSearch:
    """The interface of tests.backends.simt.executor.NearestSafe, on the GPU."""

    def __call__(self, query, bank, k, packed=None) -> Nearest:
        scores, indices = OPS.nearest_safe(*to_gpu([query, bank, k, packed]))
        return Nearest(scores.cpu(), indices.cpu(), {})

    def pack(self, bank):
        return OPS.pack_bank(bank.cuda()).cpu()


class GpuLoss:
    """The interface of the loss executors, on the GPU."""

    def __init__(self, op):
        self.op = op

    def __call__(self, *arguments):
        return [x.cpu() for x in self.op(*to_gpu(arguments))], {}


@pytest.mark.parametrize("bank_type", DTYPES)
@pytest.mark.parametrize("query_type", DTYPES)
@pytest.mark.parametrize(
    ("queries", "count", "dim", "k"),
    [
        (1, 1, 8, 1),
        (5, 300, 64, 1),
        (131, 7000, 72, 5),
        (300, 20000, 513, 32),
        (77, 30011, 768, 100),
        (9, 999, 1024, 256),
    ],
)
def test_exact_neighbors(queries, count, dim, k, query_type, bank_type):
    rows = searches.rows
    query = (rows(queries, dim, seed=1) * 10.0 ** torch.linspace(-3, 3, queries)[:, None]).to(query_type)
    searches.check(GpuSearch(), query, rows(count, dim, bank_type, seed=2), k)


@pytest.mark.parametrize(
    "case",
    ["foreign_blob_is_not_trusted", "near_duplicates", "rows_of_any_scale", "zero_rows", "nan_stays_in_its_row",
     "rounding_hides_the_best_row", "unaligned_tensor"],
)  # fmt: skip
def test_hard_searches(case):
    getattr(searches, f"test_{case}")(GpuSearch())


@pytest.mark.parametrize("bank_type", [FP32, BF16])
def test_searches_with_and_without_a_packed_bank(bank_type):
    searches.check(
        GpuSearch(),
        query := searches.rows(40, 768, seed=1),
        bank := searches.rows(9000, 768, bank_type, seed=2),
        3,
        GpuSearch().pack(bank),
    )
    searches.test_equal_rows_and_full_lists(GpuSearch(), bank_type)
    assert GpuSearch()(query, bank, 3).indices.equal(GpuSearch()(query, bank, 3, GpuSearch().pack(bank)).indices)


@pytest.mark.parametrize("current", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("batch", "dim", "k"), [(1, 64, 1), (48, 768, 1), (333, 513, 5), (1000, 1024, 32)])
def test_retarget_loss(batch, dim, k, dtype, current):
    tensors = retarget.problem(batch, dim, k, dtype, rows=500)
    retarget.check(GpuLoss(OPS.retarget_loss), tensors, [1.0, 0.7, 2.0, 0.3], 1.0, 0.1, current, True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("batch", "dim"), [(1, 64), (48, 768), (333, 513), (2000, 1024)])
def test_preservation_loss(batch, dim, dtype):
    tensors = preservation.problem(batch, dim, dtype)
    for logit_scale in (1.0, 100.0):
        weights = preservation.WEIGHTS
        preservation.check(GpuLoss(OPS.preservation_loss), tensors, weights, logit_scale, True)


def loss_arguments(op: str):
    if op == "retarget_loss":
        return to_gpu([*retarget.problem(70, 96, 3, BF16), [1.0, 1.0, 1.0, 1.0], 1.0, 0.0, False, True])
    return to_gpu([*preservation.problem(70, 96, BF16), [1.0, 1.0, 1.0, 1.0], 100.0, True])


@pytest.mark.parametrize("op", ["retarget_loss", "preservation_loss"])
def test_losses_give_the_same_bits_every_time(op):
    arguments = loss_arguments(op)
    first = getattr(OPS, op)(*arguments)
    for _ in range(20):
        assert all(a.equal(b) for a, b in zip(first, getattr(OPS, op)(*arguments), strict=True))


@pytest.mark.parametrize("op", ["retarget_loss", "preservation_loss", "preservation_loss_triton", "nearest_safe"])
def test_other_streams_and_cuda_graphs(op):
    if op == "nearest_safe":
        arguments = to_gpu([searches.rows(9, 64), searches.rows(700, 64, seed=1), 3])
    else:
        arguments = loss_arguments(op.removesuffix("_triton"))
    call = getattr(OPS, op)
    expected = call(*arguments)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        found = call(*arguments)
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call(*arguments)
    graph.replay()
    torch.cuda.synchronize()
    for e, f, c in zip(expected, found, captured, strict=True):
        assert e.equal(f) and e.equal(c)


def test_public_api_and_compile():
    """Through the public functions with gradients, eager and under torch.compile."""
    text, image, frozen_text, frozen_image = (t.cuda() for t in preservation.problem(32, 64, FP32))
    bank = sf.SafeBank(*(F.normalize(torch.randn(400, 64), dim=-1).cuda() for _ in range(2)))
    text.requires_grad_(), image.requires_grad_()

    def step():
        retarget = sf.retarget_loss(text, image, frozen_text, frozen_image, bank, 2, check=False)
        preserve = sf.preservation_loss(text, image, frozen_text, frozen_image, check=False)
        return retarget.loss + preserve.loss

    eager = torch.autograd.grad(step(), (text, image))
    compiled = torch.autograd.grad(torch.compile(step)(), (text, image))
    for e, c in zip(eager, compiled, strict=True):
        torch.testing.assert_close(e, c)
    assert sf.backends()["cuda"].usable


def test_device_guard():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA GPUs")
    query, bank = searches.rows(9, 64), searches.rows(700, 64, seed=1)
    scores, indices = OPS.nearest_safe(query.to("cuda:1"), bank.to("cuda:1"), 3)
    assert indices.device.index == 1
    assert indices.cpu().equal(reference.nearest_safe(query, bank, 3)[1])


def test_large_search_is_exact():
    """100,000 rows: compared with a float64 product on the GPU itself."""
    query, bank = searches.rows(512, 768, seed=1).cuda(), searches.rows(100_000, 768, seed=2).cuda()
    scores, indices = OPS.nearest_safe(query, bank, 8)
    expected_scores, expected_indices = reference.nearest_safe(query, bank, 8)
    assert (indices == expected_indices).float().mean() > 0.999
    torch.testing.assert_close(scores, expected_scores, rtol=2e-7, atol=0)
