"""Launcher of linear_8bit.cpp: products with an int8 weight."""

from __future__ import annotations

import ctypes
import struct

import torch
from torch import Tensor

from kbit.kernels.cpu.library import DTYPES, function, library

_DONE, _NO_MEMORY = 0, 1

# struct Task of linear_8bit.cpp: x, W, absmax, bias, out; m, n, k, most_outliers; threshold; dtype, mode and threads.
# Packed bytes cost a fifth of a ctypes.Structure.
_TASK = struct.Struct("@5P4qf3i")


def vnni() -> bool:
    """Whether integer products run on AVX512-VNNI."""
    return library().level.startswith("avx512")


def linear_8bit(
    x: Tensor,
    weight: Tensor,
    absmax: Tensor,
    bias: Tensor | None,
    threshold: float,
    quantize_x: bool,
    most_outliers: int = 0,
) -> Tensor | None:
    """`x [..., K] @ W [N, K]^T + bias` in x's dtype (fp32, bf16, fp16).

    weight: int8 `[N, K]`; absmax: fp32 `[N]` or its bits; bias: `[N]`. quantize_x: LLM.int8() with outlier
    columns from `threshold` on; with more than `most_outliers` of them, or without it, x counts as it is. None where
    plain torch should serve: x holds values that are not finite and no outliers, or too many outlier columns for a
    machine without fast integer products. Raises MemoryError.
    """
    n, k = weight.shape
    # Asking first costs less than the call.
    x = x if x.is_contiguous() else x.contiguous()
    weight = weight if weight.is_contiguous() else weight.contiguous()
    absmax = absmax if absmax.is_contiguous() else absmax.contiguous()
    bias_at = 0
    if bias is not None:
        bias = (bias if bias.dtype == x.dtype else bias.to(x.dtype)).contiguous()
        bias_at = bias.data_ptr()
    m = x.numel() // k
    out = x.new_empty((*x.shape[:-1], n))
    pointers = (x.data_ptr(), weight.data_ptr(), absmax.data_ptr(), bias_at, out.data_ptr())
    settings = (threshold, DTYPES[x.dtype], quantize_x, torch.get_num_threads())
    task = _TASK.pack(*pointers, m, n, k, most_outliers, *settings)
    result = function("kbit_linear_8bit", (ctypes.c_char_p,), ctypes.c_int32)(task)
    if result == _NO_MEMORY:
        raise MemoryError(f"no memory for the activations of a product of {m} tokens")
    return out if result == _DONE else None
