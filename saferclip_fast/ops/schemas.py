"""The op names and schemas that every backend implements, and their shape (fake) functions.

The native module registers the same schemas in C++ (csrc/ops/module.cpp) under the plain names, for CPU and CUDA
tensors; a backend written in Python registers them under `<op>_<backend>` with `register_backend`.
"""

from __future__ import annotations

import functools
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
        " bool need_grad, float logits_mib=256.) -> (Tensor loss, Tensor terms, Tensor grad_text, Tensor grad_image)"
    ),
    "info_nce_sums": (
        "(Tensor x, Tensor y, Tensor? mask, int first, float logit_scale, bool keep)"
        " -> (Tensor rows, Tensor columns, Tensor logits)"
    ),
    "info_nce_loss": (
        "(Tensor x, Tensor y, Tensor? mask, Tensor rows, Tensor columns, Tensor logits, int first, float logit_scale,"
        " bool need_grad) -> (Tensor loss, Tensor grad)"
    ),
    "neighbor_hinge": (
        "(Tensor x, Tensor rows, Tensor indices, Tensor scores, Tensor row_weights, float margin, int k,"
        " bool need_grad) -> (Tensor loss, Tensor values, Tensor grad)"
    ),
}
GRADIENTS = {
    "retarget_loss": 2,
    "preservation_loss": 2,
    "info_nce_loss": 1,
    "neighbor_hinge": 1,
}  # of the first inputs, the last outputs


def _same_device(first: Tensor, *others: object) -> None:
    """A kernel reads all its tensors on one device; traced and fake calls say so too."""
    for other in others:
        if isinstance(other, Tensor) and other.device != first.device:
            raise RuntimeError(f"all tensors must be on one device, found {first.device} and {other.device}")


def _fake_nearest_safe(query: Tensor, bank: Tensor, k: int, packed: Tensor | None = None):
    _same_device(query, bank, packed)
    shape = (query.shape[0], k)
    return query.new_empty(shape, dtype=torch.float32), query.new_empty(shape, dtype=torch.int64)


def _wide(x: Tensor) -> torch.dtype:
    """What sums are kept in."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _gradient(x: Tensor, wanted: bool) -> Tensor:
    return x.new_empty((x.shape[0] if wanted else 0, x.shape[1]))


def _fake_retarget_loss(text: Tensor, image: Tensor, *args):
    _same_device(text, image, *args)
    wide = _wide(text)
    gradients = _gradient(text, args[-1]), _gradient(image, args[-1])
    return text.new_empty((), dtype=wide), text.new_empty(4, dtype=wide), *gradients


def _fake_preservation_loss(text, image, frozen_text, frozen_image, weights, logit_scale, need_grad, logits_mib=0.0):
    return _fake_retarget_loss(text, image, frozen_text, frozen_image, need_grad)


def _fake_info_nce_sums(x: Tensor, y: Tensor, mask: Tensor | None, first: int, logit_scale: float, keep: bool):
    _same_device(x, y, mask)
    shapes = (3, x.shape[0]), (2, y.shape[0]), (x.shape[0] if keep else 0, y.shape[0])
    return tuple(x.new_empty(shape, dtype=_wide(x)) for shape in shapes)


def _fake_info_nce_loss(x: Tensor, y: Tensor, mask, rows, columns, logits, first, logit_scale, need_grad: bool):
    _same_device(x, y, mask, rows, columns, logits)
    return x.new_empty((), dtype=_wide(x)), _gradient(x, need_grad)


def _fake_neighbor_hinge(x: Tensor, rows: Tensor, indices, scores, row_weights, margin, k, need_grad: bool):
    _same_device(x, rows, indices, scores, row_weights)
    wide = _wide(x)
    return x.new_empty((), dtype=wide), x.new_empty(x.shape[:1], dtype=wide), _gradient(x, need_grad)


_FAKES: dict[str, Callable] = {
    "nearest_safe": _fake_nearest_safe,
    "retarget_loss": _fake_retarget_loss,
    "preservation_loss": _fake_preservation_loss,
    "info_nce_sums": _fake_info_nce_sums,
    "info_nce_sums_reference": lambda x, y, mask, first, scale, keep: _fake_info_nce_sums(
        x, y, mask, first, scale, False
    ),
    "info_nce_loss": _fake_info_nce_loss,
    "neighbor_hinge": _fake_neighbor_hinge,
}


def _save_gradients(ctx, inputs, output, count: int):
    ctx.save_for_backward(*output[-count:])
    ctx.set_materialize_grads(False)  # else the unused outputs get gradients of zeros, which cost more than the op
    ctx.inputs = len(inputs)


def _scale_gradients(ctx, grad_loss, *unused):
    """The kernel computed the gradients of the loss in the forward pass; only their scale is left."""
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError("saferclip_fast losses have no second derivative: call backward() without create_graph=True")
    gradients = [gradient.detach() for gradient in ctx.saved_tensors]  # as outputs of the op they require gradients
    rest = (None,) * (ctx.inputs - len(gradients))
    if grad_loss is None:  # only another output was differentiated
        return (None,) * ctx.inputs
    eager = type(grad_loss) is Tensor and not torch.compiler.is_compiling()  # not while tracing
    # a graph that is kept may be run again, and what was handed out may have been written to by then
    once = eager and not torch._C._autograd._get_current_graph_task_keep_graph()
    if once and grad_loss.device.type == "cpu" and _is_one(grad_loss):
        return *gradients, *rest  # loss.backward(): spares a pass over them
    wide = torch.promote_types(gradients[0].dtype, torch.float32)  # a loss scale of 65,536 is no float16
    scale = grad_loss.to(wide)
    return *((scale * gradient.to(wide)).to(gradient.dtype) for gradient in gradients), *rest


def _is_one(scale: Tensor) -> bool:
    try:
        return scale.item() == 1
    except RuntimeError:  # a batch of scales (is_grads_batched), which has no one value
        return False


def register_shapes_and_autograd(name: str, op: str) -> None:
    """Gives torch.ops.saferclip_fast.<name>, an implementation of `op`, its fake and autograd functions."""
    qualified = f"saferclip_fast::{name}"
    torch.library.register_fake(qualified, _FAKES.get(name, _FAKES[op]))
    if count := GRADIENTS.get(op):
        save = functools.partial(_save_gradients, count=count)
        torch.library.register_autograd(qualified, _scale_gradients, setup_context=save)


def register_backend(op: str, backend: str, function: Callable) -> None:
    """Registers a Python implementation of `op` as torch.ops.saferclip_fast.<op>_<backend>."""
    name = f"{op}_{backend}"
    torch.library.custom_op(f"saferclip_fast::{name}", function, mutates_args=(), schema=SCHEMAS[op])
    register_shapes_and_autograd(name, op)
