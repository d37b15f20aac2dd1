"""The op names and schemas that every backend implements, and their shape (fake) functions.

The native module registers the same schemas in C++ (csrc/ops/module.cpp) under the plain names, for CPU and CUDA
tensors; a backend written in Python registers them under `<op>_<backend>` with `register_backend`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

SCHEMAS = {
    "nearest_safe": "(Tensor query, Tensor bank, int k, Tensor? packed=None) -> (Tensor scores, Tensor indices)",
    "retarget_loss": (
        "(Tensor text, Tensor image, Tensor frozen_text, Tensor frozen_image, Tensor bank_text, Tensor bank_image,"
        " Tensor neighbors, Tensor neighbor_weights, Tensor row_weights, float[] weights, float beta, float margin,"
        " bool current_negative, bool need_grad)"
        " -> (Tensor loss, Tensor terms, Tensor grad_text, Tensor grad_image)"
    ),
    "preservation_loss": (
        "(Tensor text, Tensor image, Tensor frozen_text, Tensor frozen_image, float[] weights, float logit_scale,"
        " bool need_grad) -> (Tensor loss, Tensor terms, Tensor grad_text, Tensor grad_image)"
    ),
}


def _same_device(first: Tensor, *others: object) -> None:
    """A kernel reads all its tensors on one device; traced and fake calls say so too."""
    for other in others:
        if isinstance(other, Tensor) and other.device != first.device:
            raise RuntimeError(f"all tensors must be on one device, found {first.device} and {other.device}")


def _fake_nearest_safe(query: Tensor, bank: Tensor, k: int, packed: Tensor | None = None):
    _same_device(query, bank, packed)
    shape = (query.shape[0], k)
    return query.new_empty(shape, dtype=torch.float32), query.new_empty(shape, dtype=torch.int64)


def _fake_loss(text: Tensor, *args):
    """Shapes of (loss, terms, grad_text, grad_image): the same for both losses; need_grad is the last argument."""
    _same_device(text, *args)
    wide = torch.float64 if text.dtype == torch.float64 else torch.float32
    count = text.shape[0] if args[-1] else 0
    grad = text.new_empty((count, text.shape[1]))
    return text.new_empty((), dtype=wide), text.new_empty(4, dtype=wide), grad, torch.empty_like(grad)


_FAKES: dict[str, Callable] = {
    "nearest_safe": _fake_nearest_safe,
    "retarget_loss": _fake_loss,
    "preservation_loss": _fake_loss,
}


def _save_gradients(ctx, inputs, output):
    ctx.save_for_backward(output[2], output[3])
    ctx.set_materialize_grads(False)  # else the unused outputs get gradients of zeros, which cost more than the op
    ctx.inputs = len(inputs)


def _scale_gradients(ctx, grad_loss, *unused):
    """The kernel computed d loss / d text and d loss / d image in the forward pass; only their scale is left."""
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError("saferclip_fast losses have no second derivative: call backward() without create_graph=True")
    grad_text, grad_image = ctx.saved_tensors
    if grad_loss is None:  # only another output was differentiated
        return (None,) * ctx.inputs
    eager = type(grad_loss) is Tensor and not torch.compiler.is_compiling()  # not while tracing
    # a graph that is kept may be run again, and what was handed out may have been written to by then
    once = eager and not torch._C._autograd._get_current_graph_task_keep_graph()
    if once and grad_loss.device.type == "cpu" and _is_one(grad_loss):
        return grad_text, grad_image, *(None,) * (ctx.inputs - 2)  # loss.backward(): spares a pass over both
    scale = grad_loss.to(grad_text.dtype)
    return scale * grad_text, scale * grad_image, *(None,) * (ctx.inputs - 2)


def _is_one(scale: Tensor) -> bool:
    try:
        return scale.item() == 1
    except RuntimeError:  # a batch of scales (is_grads_batched), which has no one value
        return False


def register_shapes_and_autograd(name: str, op: str) -> None:
    """Gives torch.ops.saferclip_fast.<name>, an implementation of `op`, its fake and autograd functions."""
    qualified = f"saferclip_fast::{name}"
    torch.library.register_fake(qualified, _FAKES[op])
    if op != "nearest_safe":  # a search has no gradient
        torch.library.register_autograd(qualified, _scale_gradients, setup_context=_save_gradients)


def register_backend(op: str, backend: str, function: Callable) -> None:
    """Registers a Python implementation of `op` as torch.ops.saferclip_fast.<op>_<backend>."""
    name = f"{op}_{backend}"
    torch.library.custom_op(f"saferclip_fast::{name}", function, mutates_args=(), schema=SCHEMAS[op])
    register_shapes_and_autograd(name, op)
