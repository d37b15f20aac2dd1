"""Gives Triton's interpreter the arithmetic of the hardware where its own differs.

Triton 3.8's interpreter keeps bfloat16 as uint16: its conversion from float32 truncates (and, when asked to round,
carries wrongly out of the mantissa), and its tl.dot multiplies the raw uint16. Its float32 products neither cut to
TF32 nor add up in an order that is independent of the tile's shape. Conversion and product are replaced here; the
kernels themselves are unchanged. A reduction with a function of our own goes element by element there (minutes a tile);
here the same function takes a whole slice. Each call of a kernel, and of a function by a kernel, looks for the
language's builtins anew, which took 0.4 of the time; here the first one's list is kept.
"""

from __future__ import annotations

import functools
import inspect

PRODUCTS_AN_INSTRUCTION = 8  # along d: exact products, added exactly, then one float32 rounding into the accumulator


@functools.cache  # patching twice would wrap the patch
def correct_interpreter() -> None:
    """Has to run before a kernel does, under TRITON_INTERPRET=1."""
    import numpy as np
    import torch
    import triton.language as tl
    from triton._C.libtriton import ir
    from triton.runtime import interpreter

    stock_convert = interpreter._convert_float

    def convert(data, from_dtype, to_dtype, rounding):
        if (from_dtype, to_dtype) == (tl.float32, tl.bfloat16):
            bits = torch.from_numpy(np.ascontiguousarray(data)).to(torch.bfloat16).view(torch.int16)
            return bits.numpy().view(np.uint16).reshape(data.shape)
        return stock_convert(data, from_dtype, to_dtype, rounding)

    def operand(handle, precision):
        if handle.dtype.scalar == tl.bfloat16:
            data = (handle.data.astype(np.uint32) << 16).view(np.float32)
        elif precision == ir.INPUT_PRECISION.TF32 and handle.dtype.scalar == tl.float32:
            data = (np.ascontiguousarray(handle.data).view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32)
        else:
            data = handle.data
        return data.astype(np.float64)

    def dot(self, a, b, d, input_precision, max_num_imprecise_acc):
        left, right, total = operand(a, input_precision), operand(b, input_precision), d.data
        for k in range(0, left.shape[1], PRODUCTS_AN_INSTRUCTION):
            step = slice(k, k + PRODUCTS_AN_INSTRUCTION)
            total = (total + left[:, step] @ right[step]).astype(d.data.dtype)
        return interpreter.TensorHandle(total, d.dtype.scalar)

    def reduce(self, inputs):
        def at(place):
            return tuple(self.to_tensor(np.take(t.handle.data, place, self.axis), t.dtype) for t in inputs)

        total = at(0)
        for place in range(1, inputs[0].handle.data.shape[self.axis]):
            total = self.combine_fn.fn(*total, *at(place))
        return list(total)

    @functools.cache
    def builtins(package):
        return [name for name, member in inspect.getmembers(package) if tl.core.is_builtin(member)]

    def patch_builtin(package, builder, scope):
        names = builtins(package)
        if names and tl.core.is_builtin(getattr(package, names[0])):  # else the running kernel has patched them all
            for name in names:
                interpreter._patch_attr(package, name, getattr(package, name), builder, scope)

    interpreter._convert_float = convert
    interpreter._patch_builtin = patch_builtin
    interpreter.ReduceOps.generic_reduce = reduce
    interpreter.InterpreterBuilder.create_dot = dot
