"""Other libraries' ways to do the same, where they are installed. A way's name says the version and what differs.

`contrast` ways are symmetric InfoNCE of unit rows at scale 100 with frozen counterparts: a loss of (u, v).
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version

import torch
import torch.nn.functional as F
from torch import Tensor

SCALE = 100.0


def named(module: str, *packages: str, differs: str = "") -> str | None:
    """The way's name with its version, or None where the module is not installed."""
    if importlib.util.find_spec(module) is None:
        return None
    name, found = module, "of unknown version"
    for package in packages or (module,):
        try:
            name, found = package, version(package)
            break
        except PackageNotFoundError:
            continue
    return f"{name} {found}" + (f" ({differs})" if differs else "")


def search(query: Tensor, bank: Tensor, k: int) -> dict[str, Callable[[], object]]:
    """Exact search of unit rows on a GPU; none of them has a rule for ties."""
    unit, ways = F.normalize(query, dim=-1), {}
    if not query.is_cuda:
        return ways
    if way := named("faiss", "faiss-gpu-cu12", "faiss-gpu-cuvs", "faiss-gpu", differs="fp32, no tie rule"):
        import faiss
        import faiss.contrib.torch_utils  # lets faiss take CUDA tensors

        if hasattr(faiss, "StandardGpuResources"):
            index = faiss.GpuIndexFlatIP(faiss.StandardGpuResources(), bank.shape[1])
            index.add(bank)
            ways[way] = functools.partial(index.search, unit, k)
    if way := named("cuvs", "cuvs-cu13", "cuvs-cu12", differs="fp32, no tie rule"):
        from cuvs.neighbors import brute_force

        index = brute_force.build(bank, metric="inner_product")
        ways[way] = functools.partial(brute_force.search, index, unit, k)
    if way := named("flashlib", differs="bf16 inputs, no tie rule"):
        from flashlib import flash_knn  # the smallest distances of unit rows are the largest products

        ways[way] = functools.partial(flash_knn, unit.bfloat16(), bank.bfloat16(), k)
    return ways


def contrast(device: str, batch: int) -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
    """Losses of unit rows u and frozen unit rows v."""
    labels, ways = torch.arange(batch, device=device), {}

    def both(loss: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
        """Rows, then columns: S is made twice."""
        return lambda u, v: (loss(SCALE * u, v) + loss(v, SCALE * u)) / 2

    if hasattr(F, "linear_cross_entropy"):
        options = torch.nn.LinearCrossEntropyOptions()
        way = f"F.linear_cross_entropy {torch.__version__} (in chunks, logits in the inputs' dtype)"
        ways[way] = both(lambda x, rows: F.linear_cross_entropy(x, rows, labels, options=options))
    if device != "cuda":
        return ways
    if way := named("liger_kernel", "liger-kernel", differs="in chunks, logits in the inputs' dtype"):
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        ways[way] = both(lambda x, rows: LigerFusedLinearCrossEntropyLoss()(rows, x, labels))
    if way := named("inf_cl", "inf_cl", "inf-cl"):
        from inf_cl import cal_inf_loss

        ways[way] = both(lambda x, rows: cal_inf_loss(x, rows))
    if way := named("memeff", differs="MemoryEfficientLiTLoss, sums shifted by the scale"):
        from memeff import MemoryEfficientLiTLoss

        ways[way] = MemoryEfficientLiTLoss(temperature=1 / SCALE, normalized_inputs=True, stable=False)
    return ways
