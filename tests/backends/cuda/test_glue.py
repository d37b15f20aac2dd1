"""The CUDA ops of the native module, as far as a machine without a GPU can see them."""

import ctypes
import os
import subprocess
import sys

import pytest
import torch

import saferclip_fast as sf
from tests.backends.simt.build import ROOT

_C = pytest.importorskip("saferclip_fast._C", reason="the native module is not built", exc_type=ImportError)
if _C.cuda_version is None:
    pytest.skip("the native module was built without CUDA (no nvcc)", allow_module_level=True)


@pytest.mark.parametrize("op", ["nearest_safe", "pack_bank", "retarget_loss", "preservation_loss"])
def test_ops_are_registered_for_cuda(op):
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"saferclip_fast::{op}", "CUDA")


def test_backends_says_what_is_built_and_why_it_is_not_usable():
    cuda = sf.backends()["cuda"]
    assert cuda.ops == ("nearest_safe", "retarget_loss", "preservation_loss")
    assert _C.cuda_version in cuda.detail
    assert "80" in cuda.detail and "90" in cuda.detail and "100" in cuda.detail
    if not torch.cuda.is_available():
        assert not cuda.usable
        assert "no CUDA device" in cuda.detail
        with pytest.raises(RuntimeError, match="cannot run nearest_safe here"):
            sf.nearest_safe(torch.eye(4), torch.eye(4), backend="cuda")


def test_module_needs_no_cuda_library():
    """The runtime is linked in: nothing of CUDA has to be installed where the module is imported."""
    needed = subprocess.run(["ldd", _C.__file__], capture_output=True, text=True, check=True).stdout
    assert "libtorch_cpu" in needed
    assert "libcuda" not in needed and "cublas" not in needed and "libtorch_cuda" not in needed


def test_stream_comes_from_the_stable_shim():
    """The glue looks this symbol up at run time; it must be where it looks."""
    if torch.version.cuda is None:
        pytest.skip("this torch was built without CUDA")
    library = ctypes.CDLL("libtorch_cuda.so", mode=os.RTLD_NOLOAD | os.RTLD_LAZY)
    assert library.aoti_torch_get_current_cuda_stream


def test_import_in_a_fresh_process_does_not_touch_a_gpu():
    code = "import saferclip_fast, torch; assert not torch.cuda.is_initialized()"
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
