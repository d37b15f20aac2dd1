"""The native module (csrc/ops/module.cpp); absent where the package was built without a C++ compiler."""

compiler: str
cuda_version: str | None  # of the statically linked CUDA runtime; None: built without CUDA
cuda_architectures: str | None
max_neighbors: int  # the largest k of nearest_safe

def cpu_isas() -> list[str]:
    """Instruction sets of the CPU kernels that this CPU runs, best first; SAFERCLIP_FAST_ISA picks one."""
