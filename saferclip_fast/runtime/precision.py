"""The precision that encoders run in."""

from __future__ import annotations

from typing import Literal

import torch


def native_precision(device: torch.device) -> Literal["bf16", "fp32"]:
    """ "bf16" where the hardware multiplies bfloat16, else "fp32".

    A CPU without such instructions converts every number: on AVX2 the forward pass of ViT-B/32 took three times that of
    fp32.
    """
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    tests = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return "bf16" if any(getattr(torch.cpu, test, bool)() for test in tests) else "fp32"


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Autocast to "bf16" or "fp16", or nothing for "fp32"; "auto" is `native_precision`."""
    if precision == "auto":
        precision = native_precision(device)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    enabled = precision != "fp32"
    return torch.autocast(device.type, dtype=dtype if enabled else None, enabled=enabled)
