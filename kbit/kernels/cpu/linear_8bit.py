"""Launcher of linear_8bit.cpp: products with an int8 weight."""

from __future__ import annotations

import ctypes
import math

import torch
from torch import Tensor

from kbit.kernels.cpu import library
from kbit.kernels.cpu.library import DTYPES

_DONE, _NO_MEMORY = 0, 1


class _Task(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("x", "w", "absmax", "bias", "out")),
        *((name, ctypes.c_int64) for name in ("m", "n", "k", "most_outliers")),
        ("threshold", ctypes.c_float),
        *((name, ctypes.c_int32) for name in ("dtype", "mode", "threads")),
    ]


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
    x, weight, absmax = x.contiguous(), weight.contiguous(), absmax.contiguous()
    bias = None if bias is None else bias.to(x.dtype).contiguous()
    out = torch.empty((*x.shape[:-1], n), dtype=x.dtype)
    task = _Task(
        *(x.data_ptr(), weight.data_ptr(), absmax.data_ptr(), None if bias is None else bias.data_ptr()),
        *(out.data_ptr(), math.prod(x.shape[:-1]), n, k, most_outliers, threshold),
        *(DTYPES[x.dtype], int(quantize_x), torch.get_num_threads()),
    )
    result = library.function("kbit_linear_8bit", (ctypes.POINTER(_Task),), ctypes.c_int32)(task)
    if result == _NO_MEMORY:
        raise MemoryError(f"no memory for the activations of a product of {math.prod(x.shape[:-1])} tokens")
    return out if result == _DONE else None
