"""The precision that encoders run in."""

from __future__ import annotations

import torch


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Autocast to "bf16" or "fp16", or nothing for "fp32"."""
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    enabled = precision != "fp32"
    return torch.autocast(device.type, dtype=dtype if enabled else None, enabled=enabled)
