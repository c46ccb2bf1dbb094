"""What the 4-bit Triton kernels share: how a block scale is read, and how a launch finds its device and stream."""

from __future__ import annotations

import contextlib
import math
from contextlib import AbstractContextManager
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kbit.formats.codebooks import codebook

TRITON_DTYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
# Contraction of a * b + c into one rounding would change decoded scales and codes: every launch turns it off.
NO_FMA = {"enable_fp_fusion": False}


class Scales(NamedTuple):
    """Block scales as kernels read them. Plain: fp32 `[B]` and three dummies; double-quantized: uint8 codes `[B]`,
    fp32 nested absmax `[ceil(B / 256)]`, fp32 offset `[1]`, and the dynamic map fp32 `[256]`."""

    absmax: Tensor
    nested_absmax: Tensor
    offset: Tensor
    table: Tensor
    nested: bool


def as_float(scales: Tensor) -> Tensor:
    """fp32 scales from fp32 or from their bits as int32; contiguous."""
    return (scales.view(torch.float32) if scales.dtype == torch.int32 else scales).contiguous()


def scales_of(absmax: Tensor, nested_absmax: Tensor | None, nested_offset: Tensor | None) -> Scales:
    if nested_absmax is None or nested_offset is None:
        absmax = as_float(absmax)
        return Scales(absmax, absmax, absmax, absmax, False)
    table = codebook("dynamic8", absmax.device)
    return Scales(absmax.contiguous(), as_float(nested_absmax), as_float(nested_offset), table, True)


def as_rows(x: Tensor) -> Tensor:
    """`[..., K]` -> `[M, K]` with unit stride along K, copied only where strides demand it."""
    k = x.shape[-1]
    rows = x.reshape(math.prod(x.shape[:-1]), k)
    if rows.stride(1) != 1 or (rows.shape[0] > 1 and rows.stride(0) < k):
        rows = rows.contiguous()
    return rows


def on_device(tensor: Tensor) -> AbstractContextManager[object]:
    """Make the tensor's device current for a launch: Triton and CUDA launch on the current device and stream."""
    if tensor.device.type == "cuda" and tensor.device.index != torch.cuda.current_device():
        return torch.cuda.device(tensor.device)
    if tensor.device.type == "xpu" and tensor.device.index != torch.xpu.current_device():
        return torch.xpu.device(tensor.device)
    return contextlib.nullcontext()


@triton.jit
def load_scale(absmax, nested_absmax, offset, table, block, mask, NESTED: tl.constexpr):
    """fp32 scales of the blocks with flat indices `block` (int64); two separate roundings when double-quantized."""
    if NESTED:
        code = tl.load(absmax + block, mask=mask, other=0).to(tl.int32)
        group = tl.load(nested_absmax + block // 256, mask=mask, other=0.0)
        scale = tl.load(table + code) * group + tl.load(offset)
    else:
        scale = tl.load(absmax + block, mask=mask, other=0.0)
    return scale
