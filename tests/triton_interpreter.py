"""Where Triton's interpreter computes differently from devices. Each difference would fail kernels that are right."""

from __future__ import annotations

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle


def mend() -> None:
    """Call once, in a process with TRITON_INTERPRET=1, before a kernel runs.

    - fp32 to bf16 rounds to nearest even (the interpreter cuts), and subnormal bf16 is read as what it is;
    - integers become bf16 values (the interpreter takes them for bits), and a product of bf16 has their values;
    - a fused multiply-add rounds once: float64 holds the product exactly;
    - the end of a range may be a loaded value (with NumPy 2.5, Triton 3.6 fails there).
    """
    convert, cast, dot = interpreter._convert_float, InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot
    patch_tensor = interpreter._patch_lang_tensor

    def convert_nearest(data, source, target, rounding):  # type: ignore[no-untyped-def]
        if source == tl.float32 and target == tl.bfloat16:
            return torch.from_numpy(data.copy()).bfloat16().view(torch.int16).numpy().view(np.uint16)
        if source == tl.bfloat16 and target == tl.float32:
            return data.astype(np.uint32) << np.uint32(16)
        return convert(data, source, target, rounding)

    def int_to_float(self, source, target):  # type: ignore[no-untyped-def]
        if target.scalar != tl.bfloat16:
            return cast(self, source, target)
        return cast(self, TensorHandle(source.data.astype(np.float32), tl.float32), target)

    def values(handle: TensorHandle) -> TensorHandle:
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        return TensorHandle((handle.data.astype(np.uint32) << np.uint32(16)).view(np.float32), tl.float32)

    def dot_of_values(self, a, b, d, precision, imprecise):  # type: ignore[no-untyped-def]
        return dot(self, values(a), values(b), d, precision, imprecise)

    def fused(self, x, y, z):  # type: ignore[no-untyped-def]
        exact = x.data.astype(np.float64) * y.data.astype(np.float64) + z.data.astype(np.float64)
        return TensorHandle(exact.astype(z.data.dtype), z.dtype.scalar)

    def patch_tensor_with_index(tensor, scope):  # type: ignore[no-untyped-def]
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._convert_float = convert_nearest
    interpreter._patch_lang_tensor = patch_tensor_with_index
    InterpreterBuilder.create_si_to_fp = int_to_float
    InterpreterBuilder.create_dot = dot_of_values
    InterpreterBuilder.create_fma = fused
