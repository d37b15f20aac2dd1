"""Gates 2 and 3: the kernels compile for every target, and ptxas left what the design counts on."""

import pytest

from tests.backends.cuda import compiled

pytestmark = [
    pytest.mark.skipif(compiled.nvcc() is None, reason="needs nvcc, which is not on PATH"),
    pytest.mark.skipif(compiled.cuobjdump() is None, reason="needs cuobjdump (CUDA toolkit or the triton package)"),
]

SM_SHARED = {"80": 164 << 10, "90a": 228 << 10, "100a": 228 << 10}  # bytes; a block takes 1 KiB more than it asks
SM_REGISTERS, SM_WARPS = 65536, 64

# Threads a block, dynamic shared memory at d = 1,024, and the most registers a thread may take.
LIMITS = {
    "screen_kernel<bf16>": (256, 67584, 128),
    "screen_kernel<fp16>": (256, 67584, 128),
    "log_sum_kernel<fp32>": (256, 81920, 128),
    "log_sum_kernel<bf16>": (256, 81920, 128),
    "log_sum_kernel<fp16>": (256, 81920, 128),
    "weights_kernel<fp32>": (256, 65536, 128),
    "weights_kernel<bf16>": (256, 65536, 128),
    "weights_kernel<fp16>": (256, 65536, 128),
    "product_kernel<fp32>": (256, 65536, 128),
    "product_kernel<bf16>": (256, 65536, 128),
    "product_kernel<fp16>": (256, 65536, 128),
    "rescore_kernel": (128, 14368, 64),
    "prepare_query_kernel<bf16>": (128, 0, 64),
    "prepare_query_kernel<fp16>": (128, 0, 64),
    "pack_rows_kernel": (128, 0, 64),
    "bound_rows_kernel": (128, 0, 64),
    "retarget_kernel": (128, 32768, 102),
    "reduce_terms_kernel": (512, 16384, 64),
    "row_facts_kernel<fp32>": (128, 0, 64),
    "row_facts_kernel<bf16>": (128, 0, 64),
    "row_facts_kernel<fp16>": (128, 0, 64),
    "transpose_kernel<fp32>": (128, 4224, 64),
    "transpose_kernel<bf16>": (128, 4224, 64),
    "transpose_kernel<fp16>": (128, 4224, 64),
    "merge_splits_kernel": (128, 0, 64),
    "row_terms_kernel": (128, 0, 64),
    "finish_kernel": (128, 0, 80),
}
TENSOR_CORES = {
    "bf16": "HMMA.16816.F32.BF16",
    "fp16": "HMMA.16816.F32",
}
MATRIX_KERNELS = [n for n in LIMITS if n.split("_kernel")[0] in ("screen", "log_sum", "weights", "product")]


def blocks_an_sm(target: str, kernel: compiled.Kernel, threads: int, shared: int) -> int:
    warps = threads // 32
    registers = -(-kernel.registers // 8) * 8 * 32 * warps
    return min(SM_REGISTERS // registers, SM_SHARED[target] // (shared + 1024), SM_WARPS // warps, 32)


@pytest.fixture(scope="module", params=compiled.TARGETS)
def target(request) -> str:
    return request.param


def test_every_kernel_has_limits(target):
    assert set(compiled.kernels(target)) == set(LIMITS)


def test_no_spills_and_no_local_memory(target):
    for name, kernel in compiled.kernels(target).items():
        touched = kernel.count("STL") + kernel.count("LDL")
        assert (kernel.stack, kernel.local, touched) == (0, 0, 0), f"{name} uses local memory"


def test_registers_and_occupancy(target):
    for name, kernel in compiled.kernels(target).items():
        threads, shared, registers = LIMITS[name]
        assert kernel.registers <= registers, name
        blocks = blocks_an_sm(target, kernel, threads, shared)
        assert blocks >= 2 or blocks * threads // 32 >= 16, f"{name}: {blocks} blocks of {threads} threads an SM"


def test_matrix_kernels_use_the_tensor_cores(target):
    for name in MATRIX_KERNELS:
        kernel, kind = compiled.kernels(target)[name], name.split("<")[1][:-1]
        if kind == "fp32":  # plain FFMA on purpose: docs/gpu-kernels.md
            assert kernel.count("FFMA") >= 128
            assert kernel.count("HMMA") == 0
        else:
            products, loads = kernel.instructions[TENSOR_CORES[kind]], kernel.count("LDSM")
            # A slice is 2 steps of 4 x 4 products and 4 + 2 loads of four matrices; ptxas may unroll slices.
            assert products > 0 and products % 32 == 0 and loads * 32 == products * 12, name
        assert kernel.count("LDGSTS") >= 4, f"{name} loads its tiles without cp.async"


@pytest.mark.parametrize("name", ["rescore_kernel", "retarget_kernel", "pack_rows_kernel", "row_facts_kernel<bf16>"])
def test_rows_are_read_sixteen_bytes_at_a_time(target, name):
    kernel = compiled.kernels(target)[name]
    assert kernel.count("LDG.E.128") > 0
    if name == "retarget_kernel":
        assert kernel.count("STG.E.128") > 0
