"""Where the checks of this folder run: on the CPU through Triton's interpreter, or on the GPU.

They are not collected with the suite: `test_triton.py` runs each file in a process of its own, because
TRITON_INTERPRET has to be set before triton is imported.
"""

from __future__ import annotations

import os

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def _mend_interpreter() -> None:
    """Triton's interpreter cuts fp32 off to bf16 where every device rounds to nearest even, misreads subnormal bf16,
    converts integers to the bits of bf16, its dot takes the bits of bf16 operands for integers, and with NumPy 2.5 that
    of Triton 3.6 takes no scalar for the end of a range. Each would fail kernels that are right."""
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    convert, dot = interpreter._convert_float, interpreter.InterpreterBuilder.create_dot

    def convert_nearest(data, source, target, mode):  # type: ignore[no-untyped-def]
        if source == tl.float32 and target == tl.bfloat16:
            bits = np.ascontiguousarray(data).view(np.uint32)
            return ((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)).astype(
                np.uint16
            )
        if source == tl.bfloat16 and target == tl.float32:
            return data.astype(np.uint32) << np.uint32(16)
        return convert(data, source, target, mode)

    def wide(handle):  # type: ignore[no-untyped-def]
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        data = (handle.data.astype(np.uint32) << np.uint32(16)).view(np.float32)
        return interpreter.TensorHandle(data, tl.float32)

    def dot_wide(self, a, b, d, precision, imprecise):  # type: ignore[no-untyped-def]
        return dot(self, wide(a), wide(b), d, precision, imprecise)

    cast = interpreter.InterpreterBuilder.cast_impl

    def int_to_float(self, source, target):  # type: ignore[no-untyped-def]
        if target.scalar != tl.bfloat16:
            return cast(self, source, target)
        return cast(self, interpreter.TensorHandle(source.data.astype(np.float32), tl.float32), target)

    patch = interpreter._patch_lang_tensor

    def patch_with_index(tensor, scope):  # type: ignore[no-untyped-def]
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patch_with_index
    interpreter.InterpreterBuilder.create_si_to_fp = int_to_float
    interpreter._convert_float = convert_nearest
    interpreter.InterpreterBuilder.create_dot = dot_wide


if INTERPRETED:
    _mend_interpreter()


@pytest.fixture(scope="session")
def device() -> str:
    return "cpu" if INTERPRETED else "cuda"


@pytest.fixture(autouse=True)
def _poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every output that a launcher allocates starts as NaN, 0xAB or 0x55: an element nobody wrote shows."""
    empty = torch.empty

    def poisoned(*args, **kwargs):  # type: ignore[no-untyped-def]
        out = empty(*args, **kwargs)
        if out.is_floating_point():
            return out.fill_(float("nan"))
        return out.fill_(0x55 if out.dtype == torch.int8 else 0xAB)

    monkeypatch.setattr(torch, "empty", poisoned)
