"""Runs the CUDA kernels on the SIMT executor with torch tensors as memory."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import torch

from . import build

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
COUNTERS = ("load_bytes", "store_bytes", "wide_loads", "narrow_loads", "mma", "fma", "launches")


def pointers(*names: str) -> list[tuple[str, type]]:
    return [(name, ctypes.c_void_p) for name in names]


def types(*names: str) -> list[tuple[str, type]]:
    return [(f"{name}_type", ctypes.c_int) for name in names]


class SimtFault(RuntimeError):
    """The executor found a race, an access out of bounds, a divergent barrier, or the like."""


class Executor:
    """One compiled kernel library, and the buffers that it may touch."""

    name: str  # of tests/backends/simt/run_<name>.cpp

    def __init__(self, **options):
        self.library = build.load(self.name, **options)
        self.reverse = False
        self.multiprocessors = 2

    def __call__(self, *arguments):
        """The outputs and the counters of one call. Both thread orders run, and must give the same bits."""
        found, counters = self.once(*arguments)
        self.reverse = True
        try:
            again, _ = self.once(*arguments)
        finally:
            self.reverse = False
        for one, other in zip(found, again, strict=True):
            assert one.flatten().view(torch.uint8).equal(other.flatten().view(torch.uint8)), "the thread order shows"
        return found, counters

    def once(self, *arguments) -> tuple[list[torch.Tensor], dict[str, int]]:
        """One call in the thread order that `reverse` says."""
        raise NotImplementedError

    def reset(self) -> None:
        self.library.simt_reset(int(self.reverse), self.multiprocessors)
        self.kept = []

    def pointer(self, tensor: torch.Tensor | None, name: str, *, output: bool = False) -> int | None:
        """Guards a contiguous tensor and gives its address; outputs hold no data yet."""
        if tensor is None:
            return None
        assert tensor.is_contiguous()
        self.kept.append(tensor)
        size = tensor.numel() * tensor.element_size()
        if size == 0:
            return None
        self.library.simt_guard(
            ctypes.c_void_p(tensor.data_ptr()), ctypes.c_int64(size), int(output), int(not output), name.encode()
        )
        return tensor.data_ptr()

    def call(self, function: str, *arguments) -> None:
        message = ctypes.create_string_buffer(1000)
        code = getattr(self.library, function)(*arguments, message, len(message))
        if code:
            raise SimtFault(message.value.decode())

    def counters(self) -> dict[str, int]:
        values = (ctypes.c_int64 * len(COUNTERS))()
        self.library.simt_counters(values)
        return dict(zip(COUNTERS, values, strict=True))


class NearestProblem(ctypes.Structure):
    _fields_ = [
        ("query", ctypes.c_void_p),
        ("bank", ctypes.c_void_p),
        ("packed", ctypes.c_void_p),
        ("queries", ctypes.c_int64),
        ("rows", ctypes.c_int64),
        ("dim", ctypes.c_int64),
        ("k", ctypes.c_int),
        ("query_type", ctypes.c_int),
        ("bank_type", ctypes.c_int),
    ]


@dataclass
class Nearest:
    scores: torch.Tensor
    indices: torch.Tensor
    counters: dict[str, int]


class NearestSafe(Executor):
    name = "nearest_safe"

    def pack(self, bank: torch.Tensor) -> torch.Tensor:
        self.reset()
        size = self.library.run_packed_bank_bytes
        size.restype = ctypes.c_int64
        packed = torch.empty(size(ctypes.c_int64(bank.shape[0]), ctypes.c_int64(bank.shape[1])), dtype=torch.uint8)
        self.call(
            "run_pack_bank",
            ctypes.c_void_p(self.pointer(bank, "bank")),
            DTYPES[bank.dtype],
            ctypes.c_int64(bank.shape[0]),
            ctypes.c_int64(bank.shape[1]),
            ctypes.c_void_p(self.pointer(packed, "packed bank", output=True)),
        )
        return packed

    def __call__(self, query: torch.Tensor, bank: torch.Tensor, k: int, packed=None) -> Nearest:
        (scores, indices), counters = super().__call__(query, bank, k, packed)
        return Nearest(scores, indices, counters)

    def once(self, query: torch.Tensor, bank: torch.Tensor, k: int, packed: torch.Tensor | None):
        self.reset()
        problem = NearestProblem(
            self.pointer(query, "query"),
            self.pointer(bank, "bank"),
            self.pointer(packed, "packed bank"),
            query.shape[0],
            bank.shape[0],
            bank.shape[1],
            k,
            DTYPES[query.dtype],
            DTYPES[bank.dtype],
        )
        size = self.library.run_workspace_bytes
        size.restype = ctypes.c_int64
        workspace = torch.empty(size(ctypes.byref(problem)) + 16, dtype=torch.uint8)
        scores = torch.empty(query.shape[0], k)
        indices = torch.empty(query.shape[0], k, dtype=torch.int64)
        self.call(
            "run_nearest_safe",
            ctypes.byref(problem),
            ctypes.c_void_p(self.pointer(workspace, "workspace", output=True)),
            ctypes.c_void_p(self.pointer(scores, "scores", output=True)),
            ctypes.c_void_p(self.pointer(indices, "indices", output=True)),
        )
        return [scores, indices], self.counters()


class RetargetProblem(ctypes.Structure):
    _fields_ = [
        *pointers("text", "image", "frozen_text", "frozen_image", "bank_text", "bank_image"),
        *pointers("neighbors", "neighbor_weights", "row_weights"),
        ("batch", ctypes.c_int64),
        ("dim", ctypes.c_int64),
        ("rows", ctypes.c_int64),
        ("k", ctypes.c_int),
        *types("row", "frozen_text", "frozen_image", "bank_text", "bank_image"),
        ("weights", ctypes.c_float * 4),
        ("beta", ctypes.c_float),
        ("margin", ctypes.c_float),
        ("current_negative", ctypes.c_int),
        ("need_grad", ctypes.c_int),
    ]


def loss_outputs(executor: Executor, like: torch.Tensor, need_grad: bool) -> tuple[list[torch.Tensor], list]:
    """loss, terms and two gradients, and their guarded addresses."""
    rows = like.shape[0] if need_grad else 0
    outputs = [torch.empty(()), torch.empty(4), *(like.new_empty(rows, like.shape[1]) for _ in range(2))]
    names = ["loss", "terms", "text gradient", "image gradient"]
    return outputs, [ctypes.c_void_p(executor.pointer(o, n, output=True)) for o, n in zip(outputs, names, strict=True)]


class RetargetLoss(Executor):
    name = "retarget_loss"

    def once(self, *arguments) -> tuple[list[torch.Tensor], dict[str, int]]:
        """The arguments and outputs of torch.ops.saferclip_fast.retarget_loss, and the counters."""
        tensors, (weights, beta, margin, current_negative, need_grad) = arguments[:9], arguments[9:]
        self.reset()
        names = [name for name, kind in RetargetProblem._fields_ if kind is ctypes.c_void_p]
        text, image, *_ = tensors
        problem = RetargetProblem(
            *(self.pointer(tensor, name) for tensor, name in zip(tensors, names, strict=True)),
            *text.shape,
            tensors[4].shape[0],
            tensors[6].shape[1],
            *(DTYPES[tensor.dtype] for tensor in (text, *tensors[2:6])),
            (ctypes.c_float * 4)(*weights),
            beta,
            margin,
            current_negative,
            need_grad,
        )
        assert text.dtype == image.dtype
        size = self.library.run_workspace_bytes
        size.restype = ctypes.c_int64
        workspace = torch.empty(size(ctypes.c_int64(text.shape[0])), dtype=torch.uint8)
        space = ctypes.c_void_p(self.pointer(workspace, "workspace", output=True))
        outputs, addresses = loss_outputs(self, text, need_grad)
        self.call("run_retarget_loss", ctypes.byref(problem), space, *addresses)
        return outputs, self.counters()


class PreservationProblem(ctypes.Structure):
    _fields_ = [
        *pointers("text", "image", "frozen_text", "frozen_image"),
        ("batch", ctypes.c_int64),
        ("dim", ctypes.c_int64),
        *types("row", "frozen_text", "frozen_image"),
        ("weights", ctypes.c_float * 4),
        ("logit_scale", ctypes.c_float),
        ("need_grad", ctypes.c_int),
        ("slice_bytes", ctypes.c_int64),
    ]


class PreservationLoss(Executor):
    name = "preservation_loss"
    slice_bytes = 1 << 20

    def once(self, text, image, frozen_text, frozen_image, weights, logit_scale, need_grad):
        """The arguments and outputs of torch.ops.saferclip_fast.preservation_loss, and the counters."""
        self.reset()
        assert text.dtype == image.dtype
        problem = PreservationProblem(
            self.pointer(text, "text"),
            self.pointer(image, "image"),
            self.pointer(frozen_text, "frozen text"),
            self.pointer(frozen_image, "frozen image"),
            *text.shape,
            *(DTYPES[tensor.dtype] for tensor in (text, frozen_text, frozen_image)),
            (ctypes.c_float * 4)(*weights),
            logit_scale,
            need_grad,
            self.slice_bytes,
        )
        size = self.library.run_workspace_bytes
        size.restype = ctypes.c_int64
        workspace = torch.empty(size(ctypes.byref(problem)) + 16, dtype=torch.uint8)
        space = ctypes.c_void_p(self.pointer(workspace, "workspace", output=True))
        outputs, addresses = loss_outputs(self, text, need_grad)
        self.call("run_preservation_loss", ctypes.byref(problem), space, *addresses)
        return outputs, self.counters()
