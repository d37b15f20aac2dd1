"""The executor and the tests find real faults: each mutant of the kernels below must fail.

Every mutation is compiled into one copy of the sources as `mutant == N ? new : old`, so a kernel library compiles once
and the faults are switched on one at a time.
"""

from __future__ import annotations

import shutil

import pytest
import torch

from tests.backends.cuda import test_nearest_safe, test_preservation_loss, test_retarget_loss
from tests.backends.simt import build
from tests.backends.simt import executor as simt
from tests.support.mutants import Mutant

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16


SYNC = "__syncthreads();"
TILE, SCREEN, RESCORE = "tile.cuh", "screen.cuh", "rescore.cuh"
ROWS, REDUCE, RETARGET, PRESERVATION = "matrix.cuh", "reduce.cuh", "retarget_loss.cuh", "preservation_loss.cuh"
KEEP = "entries[kept + __popc(votes & ((1u << lane) - 1))] = entry;"
TEXT_GRADIENT = "text.gradient(t, x, st, sv, grad);"
IMAGE_GRADIENT = "image.gradient(v, x, sv, st, grad);"
STORE_IMAGE, STORE = "store8(p.image, p.grad_image, row, chunk, grad);", "store8(a.x, a.grad, row, chunk, g);"
DIAGONAL = "w[j] = -(of_row.others[column + j] + of_column.others[column + j]);"
RANGE = "square >= 0x1p-80f && square <= 0x1p80f"

SCALED, PROJECTED = "inverse * scale", "g[i] - along * inverse * x[i]"
# In the 16-bit types the last row, small beside the others, could be anything under a rule for the whole tensor.
LAST_OF_16_BITS = "a.x.type != DType::kFloat32 && row == a.first_row + a.count - 1"
LAST_IMAGE = "p.image.type != DType::kFloat32 && row == p.batch - 1"

MUTANTS = {
    "nearest_safe": [
        Mutant("no barrier before a slice", TILE, "", SYNC),
        Mutant("wait for a slice too few", TILE, "", "cp_async_wait<kStages - 2>();", "cp_async_wait<kStages - 1>();"),
        Mutant("rows past the end of an operand", TILE, "", "inside && row < rows", "inside"),
        Mutant("bytes past the end of a row", TILE, "", "first_byte + chunk * 16 < row_bytes", "true"),
        Mutant("halves of A swapped", TILE, "a_half =", "lane / 16", "1 - lane / 16"),
        Mutant("columns of B shifted", TILE, "", "lane / 16 * 8 + lane % 8", "lane / 16 * 8 + (lane + 1) % 8"),
        Mutant("accumulator rows shifted", TILE, "r / 2 * 8 +", "lane / 4", "(lane + 4) % 32 / 4"),
        Mutant("no mask at the end of the bank", SCREEN, "", "column + j >= rows", "false"),
        Mutant("screen without its bound", SCREEN, "", "value + margin < threshold", "value < threshold"),
        Mutant("no barrier before compaction", SCREEN, "", SYNC),
        Mutant("full list taken for a whole one", SCREEN, "if (", "count > lists.capacity", "false"),
        Mutant("rows of a full list dropped", RESCORE, "const bool closed =", "count > lists.capacity", "false"),
        Mutant("entries overwritten unread", SCREEN, "if (keep)", KEEP, "entries[kept + lane + 1] = entry;"),
        Mutant("threshold of fewer rows", SCREEN, "count_at_least(middle);\n    if (", "count >= k", "2 * count > k"),
        Mutant("ties to the higher index", RESCORE, "static_cast<uint32_t>(", "~index", "index"),
        Mutant("keys written over the best", RESCORE, "state.keys[", "filled + i", "i"),
        Mutant("no barrier in the sort", RESCORE, "= a;\n      }", SYNC),
        Mutant("no barrier after the joint threshold", RESCORE, "state, all_rows);", SYNC),
        Mutant("pending rows overflow", RESCORE, "state.counts[0] >", "kPending - kRescoreThreads", "kPending"),
        Mutant("zero query not special", RESCORE, "if (", "norm == 0.0", "false"),
    ],
    "retarget_loss": [
        Mutant("no row mask", RETARGET, "if (", "row >= p.batch", "false"),
        Mutant("vector past the end of a row", ROWS, "if (", "first + 4 < m.dim", "true"),
        Mutant("targets exchanged", RETARGET, "", TEXT_GRADIENT, TEXT_GRADIENT.replace("st, sv", "sv, st")),
        Mutant("no projection", RETARGET, "out[i] =", "(g - along * inverse * x[i])", "g"),
        Mutant("no barrier in the reduction", REDUCE, "", SYNC),
        Mutant("reduction stops early", REDUCE, "step = kReduceThreads / 2;", "step > 0", "step > 1"),
        Mutant("last step of a sum wrong", ROWS, "x += __shfl_xor_sync(kFullMask, x,", "step", "step == 1 ? 0 : step"),
        Mutant("a row zero", RETARGET, "", STORE_IMAGE, f"if ({LAST_IMAGE}) scale8(grad, 0.0f); {STORE_IMAGE}"),
        Mutant("a row halved", RETARGET, "", IMAGE_GRADIENT, IMAGE_GRADIENT + " if (row == 3) scale8(grad, 0.5f);"),
        Mutant("two rows swapped", RETARGET, "store8(p.text, p.grad_text,", "row", "row < 2 ? 1 - row : row"),
        Mutant("rows of any size squared", ROWS, "", RANGE, "true"),
        Mutant("chunk skipped", RETARGET, "gather8(p, p.bank_image, row,", "chunk", "chunk ^ 1"),
    ],
    "preservation_loss": [
        Mutant("no barrier in the transpose", PRESERVATION, "chunk * 8 + i] = x[i];\n  }", SYNC),
        Mutant("no barrier before the sums", PRESERVATION, "The tiles are done with.", SYNC),
        Mutant("no barrier after the sums", PRESERVATION, "= total;\n  }", SYNC),
        Mutant("no mask at the last column", PRESERVATION, "s =", "column < last_column", "true"),
        Mutant("diagonal in the sums", PRESERVATION, "", "column != own", "true"),
        Mutant("sum not rescaled", PRESERVATION, "before.sum *", "exponential(before.largest - largest)", "1.0f"),
        Mutant("diagonal kept", PRESERVATION, "if (first_row + row == column + j)", DIAGONAL),
        Mutant("weights of a padding column", PRESERVATION, "if (", "column + j >= columns", "column + j > columns"),
        Mutant("half a copy twice", PRESERVATION, "__float_as_uint(x[", "4 + i", "i"),
        Mutant("a row halved", PRESERVATION, "x[i]) *", SCALED, SCALED + " * (row == 3 ? 0.5f : 1.0f)"),
        Mutant("a row zero", PRESERVATION, "g[i] = (", PROJECTED, f"{LAST_OF_16_BITS} ? 0.0f : {PROJECTED}"),
        Mutant("two rows swapped", PRESERVATION, "", STORE, STORE.replace("row", "row < 2 ? 1 - row : row")),
        Mutant("rows of any size squared", ROWS, "", RANGE, "true"),
    ],
}  # fmt: skip


def probe_nearest_safe(kernels: simt.Executor) -> None:
    check, rows = test_nearest_safe.check, test_nearest_safe.rows
    check(kernels, rows(5, 72, BF16, seed=1), rows(300, 72, BF16, seed=2), 2)
    generator = torch.Generator().manual_seed(0)
    opposite = -rows(1, 64, seed=1) + 0.01 * torch.randn(130, 64, generator=generator)
    check(kernels, rows(1, 64, seed=1), opposite, 1)
    spread = torch.randn(1100, 64, generator=generator).to(FP16)
    check(kernels, spread[:2], spread, 6)
    test_nearest_safe.test_rounding_hides_the_best_row(kernels)
    near = rows(1, 96, seed=1) + 1e-4 * torch.randn(700, 96, generator=torch.Generator().manual_seed(0))
    check(kernels, torch.cat([rows(2, 96, seed=3), torch.zeros(1, 96)]), near, 5)
    equal = rows(1, 64, seed=7).repeat(900, 1)
    equal[700:] = rows(200, 64, seed=8)
    check(kernels, rows(2, 64, seed=9), equal, 3)


def probe_retarget_loss(kernels: simt.Executor) -> None:
    options = ([1.0, 0.7, 2.0, 0.3], 1.0, 0.0, False, True)
    for dtype in (FP32, BF16):
        test_retarget_loss.check(kernels, test_retarget_loss.problem(5, 100, 2, dtype), *options)
    test_retarget_loss.test_rows_of_any_scale(kernels, 1e-23, False)


def probe_preservation_loss(kernels: simt.Executor) -> None:
    kernels.multiprocessors = 1
    for batch, dim, dtype, logit_scale in (
        (140, 40, BF16, 100.0),
        (6, 67, FP32, 1.0),
        (6, 40, BF16, 1.0),
        (141, 40, BF16, 1.0),
    ):
        tensors = test_preservation_loss.problem(batch, dim, dtype)
        test_preservation_loss.check(kernels, tensors, test_preservation_loss.WEIGHTS, logit_scale, True)
    test_preservation_loss.test_rows_of_any_scale(kernels, 1e-23)


EXECUTORS = {cls.name: cls for cls in (simt.NearestSafe, simt.RetargetLoss, simt.PreservationLoss)}
PROBES = {
    "nearest_safe": probe_nearest_safe,
    "retarget_loss": probe_retarget_loss,
    "preservation_loss": probe_preservation_loss,
}


@pytest.fixture(scope="module", params=MUTANTS)
def library(request, tmp_path_factory) -> tuple[str, simt.Executor]:
    """One kernel library with all its mutants compiled in, each of them off."""
    folder = tmp_path_factory.mktemp("mutants")
    for source in build.KERNELS.iterdir():
        shutil.copy(source, folder)
    for number, mutant in enumerate(MUTANTS[request.param]):
        file = folder / mutant.file
        file.write_text(mutant.rewrite(file.read_text(), number, "::simt::mutant"))
    return request.param, EXECUTORS[request.param](kernels=folder)


def test_every_mutant_fails(library):
    name, kernels = library
    probe, survivors, found = PROBES[name], [], {}
    kernels.library.simt_set_mutant(-1)
    probe(kernels)
    for number, mutant in enumerate(MUTANTS[name]):
        kernels.library.simt_set_mutant(number)
        try:
            probe(kernels)
            survivors.append(mutant.name)
        except (AssertionError, RuntimeError) as error:  # a wrong result, or a fault the executor names
            found[mutant.name] = str(error).splitlines()[0]
    kernels.library.simt_set_mutant(-1)
    print(*(f"{mutant}: {message}" for mutant, message in found.items()), sep="\n")
    assert not survivors, f"not found: {survivors}"
