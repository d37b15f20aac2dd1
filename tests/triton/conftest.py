"""Runs the Triton kernels: on a GPU where there is one, else under the interpreter (before anything imports them)."""

import torch

from .hardware_interpreter import enable

if not torch.cuda.is_available():
    enable()
