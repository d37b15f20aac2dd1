"""The state of the random generators, as tensors that a checkpoint holds."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


def pack_rng(device: torch.device) -> dict[str, Tensor]:
    """State of torch's random generators: the CPU's and, on a GPU, the device's."""
    states = {"rng.cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["rng.cuda"] = torch.cuda.get_rng_state(device)
    return states


def unpack_rng(device: torch.device, tensors: Mapping[str, Tensor]) -> None:
    """Inverse of pack_rng."""
    torch.set_rng_state(tensors["rng.cpu"].clone())  # torch 2.14 crashes on a view into a larger tensor
    if device.type == "cuda" and "rng.cuda" in tensors:
        torch.cuda.set_rng_state(tensors["rng.cuda"].cpu().clone(), device)
