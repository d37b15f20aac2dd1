"""Runs the Triton kernels: on a GPU where there is one, else under the interpreter (see ../../conftest.py)."""

import torch

from .hardware_interpreter import correct_interpreter

if not torch.cuda.is_available():
    correct_interpreter()
