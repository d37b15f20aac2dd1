"""What the launcher leaves behind when it fails."""

import subprocess

import pytest
import torch

from tests.backends.cuda import compiled
from tests.backends.simt.build import CSRC, KERNELS, ROOT, SHARED, content_hash

PROGRAM = """
#include <cstdio>
#include "kernels/cuda/device.cuh"
__global__ void kernel(int) {}
int main() {
  const int error = saferclip::launch(nullptr, kernel, dim3(1), 32, size_t(1) << 30, 1);  // no chip has that much
  std::printf("%d %d", error != cudaSuccess, int(cudaGetLastError()));
}
"""


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU: run `make gpu-check` on one")
@pytest.mark.skipif(compiled.nvcc() is None, reason="needs nvcc, which is not on PATH")
def test_a_failed_launch_leaves_no_error_for_the_next_call():
    folder = ROOT / "build" / "cuda"
    folder.mkdir(parents=True, exist_ok=True)
    program = folder / f"launch-{content_hash(SHARED, KERNELS, PROGRAM)}"
    if not program.exists():
        source = program.with_suffix(".cu")
        source.write_text(PROGRAM)
        command = [compiled.nvcc(), "-std=c++17", "-arch=sm_80", f"-I{CSRC}", str(source), "-o", str(program)]
        subprocess.run(command, check=True)
    assert subprocess.run([str(program)], capture_output=True, text=True, check=True).stdout == "1 0"
