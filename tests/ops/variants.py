"""Every implementation of the ops that this machine can run: the list that the property tests are parametrised over.

A new backend is one more entry of `variants`.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import NamedTuple

import torch

import saferclip_fast as sf

OPS = torch.ops.saferclip_fast


class Variant(NamedTuple):
    name: str
    suffix: str = ""  # of the op: torch.ops.saferclip_fast.<op><suffix>
    device: str = "cpu"
    isa: str = ""  # of the cpu kernels

    def __str__(self) -> str:
        return self.name

    def __call__(self, op: str, *args):
        """Runs `op` on this variant; tensors go to its device and come back."""
        move = [a.to(self.device) if isinstance(a, torch.Tensor) else a for a in args]
        with self.environment():
            out = getattr(OPS, op + self.suffix)(*move)
        return tuple(x.cpu() for x in out) if isinstance(out, tuple) else out.cpu()

    @contextlib.contextmanager
    def environment(self) -> Iterator[None]:
        before = os.environ.get("SAFERCLIP_FAST_ISA")
        os.environ["SAFERCLIP_FAST_ISA"] = self.isa
        try:
            yield
        finally:
            if before is None:
                del os.environ["SAFERCLIP_FAST_ISA"]
            else:
                os.environ["SAFERCLIP_FAST_ISA"] = before


def cpu_variants() -> list[Variant]:
    if not sf.backends()["cpu"].usable:
        return []
    from saferclip_fast import _C

    return [Variant(f"cpu-{isa}", isa=isa) for isa in _C.cpu_isas()]


def variants(op: str) -> list[Variant]:
    """All variants that implement `op`."""
    return [v for v in cpu_variants() if op in sf.backends()["cpu"].ops]


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
