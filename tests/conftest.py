"""Where there is no GPU the Triton kernels are interpreted, which has to be settled before anything imports them."""

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
