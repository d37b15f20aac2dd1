"""The words of `backends()` on machines other than this one: no native module, no triton, no or an old GPU."""

import importlib
import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

import saferclip_fast as sf

backends = importlib.import_module("saferclip_fast.ops.backends")  # the name in the package is the function

PURE_PYTHON = """
import json, sys
sys.modules["saferclip_fast._C"] = sys.modules["triton"] = None  # importing either fails
import torch
import saferclip_fast as sf

text, image = torch.randn(2, 30, 8, generator=torch.Generator().manual_seed(0))
bank = sf.SafeBank(text, image).pack()
found = sf.nearest_safe(text[:5] + 0.1, bank, 3)
live = text[:5].clone().requires_grad_()
loss = sf.retarget_loss(live, image[:5], text[5:10], image[5:10], bank).loss
loss = loss + sf.preservation_loss(live, image[:5], text[5:10], image[5:10]).loss
loss.backward()
rows = sf.backends()
print(json.dumps({
    "packed": bank.packed is not None,
    "indices": found.indices.tolist(),
    "loss": loss.item(),
    "gradient": live.grad.norm().item(),
    "rows": {name: [row.usable, row.detail] for name, row in rows.items()},
    "picked": len(rows["reference"].picked),
}))
"""


def test_the_native_module_and_python_have_one_limit_of_k():
    native = pytest.importorskip("saferclip_fast._C", reason="the native module is not built", exc_type=ImportError)
    assert native.max_neighbors == backends.MAX_NATIVE_K


def test_without_a_native_module_everything_runs_and_says_why_it_is_slow():
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run([sys.executable, "-c", PURE_PYTHON], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    text, image = torch.randn(2, 30, 8, generator=torch.Generator().manual_seed(0))
    bank = sf.SafeBank(text, image)
    assert told["indices"] == sf.nearest_safe(text[:5] + 0.1, bank, 3).indices.tolist()
    live = text[:5].clone().requires_grad_()
    loss = sf.retarget_loss(live, image[:5], text[5:10], image[5:10], bank).loss
    loss = loss + sf.preservation_loss(live, image[:5], text[5:10], image[5:10]).loss
    loss.backward()
    assert told["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert told["gradient"] == pytest.approx(live.grad.norm().item(), rel=1e-5)
    assert not told["packed"] and told["picked"] == 3
    usable, why = told["rows"]["cpu"]
    assert not usable and "the native module is not built" in why and "C++ compiler" in why
    assert told["rows"]["cuda"] == [False, why]
    assert told["rows"]["triton"] == [False, "the triton package is not installed; pip install triton"]
    assert told["rows"]["reference"][0]


@pytest.mark.parametrize(
    ("capability", "usable", "detail"),
    [
        (None, False, "torch sees no CUDA device"),
        ((7, 5), False, "Old is older than compute capability 8.0"),
        ((8, 0), True, "built for 80 90a, CUDA runtime 12.8 linked in"),
    ],
)
def test_a_gpu_is_used_from_compute_capability_8_on(monkeypatch, capability, usable, detail):
    monkeypatch.setattr(backends, "_C", SimpleNamespace(cuda_architectures="80 90a", cuda_version="12.8"))
    monkeypatch.setattr(backends, "_has_kernel", lambda op, key: key == "CUDA")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: capability is not None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Old")
    row = backends.built.__wrapped__()["cuda"]
    assert row.usable is usable and detail in row.detail and "nearest_safe" in row.ops
    triton = backends.built.__wrapped__()["triton"]
    assert triton.usable == (capability is not None or os.environ.get("TRITON_INTERPRET") == "1")
    assert backends.built.__wrapped__()["cpu"].detail == "the native module was built without CPU kernels"
