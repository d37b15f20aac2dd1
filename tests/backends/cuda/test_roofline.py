"""Gate 4: the executor counts what the roofline's formulas say, and the docs show their tables."""

import re

import pytest
import torch

from benchmarks.gpu import roofline
from tests.backends.cuda import test_nearest_safe, test_preservation_loss, test_retarget_loss
from tests.backends.simt import executor as simt
from tests.backends.simt.build import ROOT

FP32, BF16 = torch.float32, torch.bfloat16


@pytest.mark.parametrize("bank_type", [FP32, BF16])
def test_search(bank_type):
    queries, count, dim, k = 200, 1100, 128, 1
    query, bank = test_nearest_safe.rows(queries, dim), test_nearest_safe.rows(count, dim, bank_type, seed=1)
    counters = simt.NearestSafe()(query, bank, k).counters
    assert counters["mma"] == roofline.tile_products(queries, count, dim, 2)
    tiles = roofline.tile_bytes(queries, count, 2 * dim)
    bounds = roofline.ceil_div(queries, 128) * roofline.ceil_div(count, 128) * 256 * 8 * 16
    prepare = (count + queries) * dim * 4 * 2
    lists = queries * 16 * 300  # survivors: written once each, read by each compaction and by the rescoring
    rescored = queries * roofline.RESCORED * k * dim * 4
    assert tiles + bounds < counters["load_bytes"] < tiles + bounds + prepare + 8 * lists + rescored
    assert counters["store_bytes"] < (count + queries) * (2 * dim + 16 + 8) + 4 * lists


@pytest.mark.parametrize(("dtype", "size"), [(FP32, 4), (BF16, 2)])
def test_retarget_loss_loads_and_stores(dtype, size):
    batch, dim, k = 16, 256, 3
    tensors = test_retarget_loss.problem(batch, dim, k, dtype)
    _, counters = simt.RetargetLoss()(*tensors, [1.0, 1.0, 1.0, 1.0], 1.0, 0.0, False, True)
    assert counters["load_bytes"] == roofline.retarget_loads(batch, dim, k, size, 4)
    assert counters["store_bytes"] == batch * dim * 2 * size + batch * 16 + 5 * 4
    lists = batch * (dim // 8) * 2 * k * (8 + 4)
    assert counters["wide_loads"] * 16 == counters["load_bytes"] - lists  # all rows in 16-byte accesses


@pytest.mark.parametrize(("dtype", "counter"), [(BF16, "mma"), (FP32, "fma")])
def test_preservation_loss_products(dtype, counter):
    batch, dim = 140, 64
    tensors = test_preservation_loss.problem(batch, dim, dtype)
    _, counters = simt.PreservationLoss()(*tensors, [1.0, 1.0, 1.0, 1.0], 100.0, True)
    assert counters[counter] == roofline.preservation_products(batch, dim, dtype.itemsize)


def test_the_docs_show_the_tables():
    """Regenerate with `python -m benchmarks.gpu.roofline` and paste between the markers."""
    text = (ROOT / "docs" / "gpu-kernels.md").read_text()
    shown = re.search(r"<!-- roofline -->\n(.*?)\n<!-- /roofline -->", text, re.DOTALL)
    assert shown
    assert shown[1].strip() == roofline.tables().strip()
