"""What the 4-bit Triton kernels share: how weights are decoded and multiplied, and how a launch finds its device."""

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


@triton.jit
def decode_elements(
    packed, absmax, nested_absmax, offset, table, values, element, inside, NESTED: tl.constexpr, BLOCK: tl.constexpr
):
    """fp32 weights with the flat indices `element` (int64), in either layout. `values`: the fp32 codebook, so that a
    weight is rounded once, where it enters the product, as the reference does."""
    code = tl.load(packed + element // 2, mask=inside, other=0).to(tl.int32)
    code = tl.where(element % 2 == 0, code >> 4, code & 15)
    return tl.load(values + code) * load_scale(absmax, nested_absmax, offset, table, element // BLOCK, inside, NESTED)


@triton.jit
def add_step(
    acc,
    xs,
    packed,
    absmax,
    nested_absmax,
    offset,
    table,
    values,
    row,
    step,
    K,
    inside,
    NESTED: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
):
    """`acc [BN, BM]` plus the product of the weights' rows `row [BN]` (int64; read where `inside`) with `xs [BM, BK]`
    over the columns of a step.

    ROWS: no block crosses a row and K is even (row layout); a step covers at most one block, so codebook values in the
    dtype of x enter the product and the fp32 sum is scaled. Otherwise element e of the flat order is nibble e % 2 of
    byte e // 2 and belongs to block e // BLOCK, wherever a row begins."""
    if ROWS:
        half = step * (BK // 2) + tl.arange(0, BK // 2)
        code = tl.load(packed + row[:, None] * (K // 2) + half[None, :], mask=inside[:, None], other=0).to(tl.int32)
        block = row * (K // BLOCK) + step * BK // BLOCK
        scale = load_scale(absmax, nested_absmax, offset, table, block, inside, NESTED)
        even, odd = tl.split(tl.reshape(xs, (BM, BK // 2, 2)))
        part = tl.dot(tl.load(values + (code >> 4)), tl.trans(even), input_precision="ieee")
        part = tl.dot(tl.load(values + (code & 15)), tl.trans(odd), part, input_precision="ieee")
        acc += part * scale[:, None]
    else:
        k = step * BK + tl.arange(0, BK)
        element = row[:, None] * K + k[None, :]
        weight = decode_elements(
            packed,
            absmax,
            nested_absmax,
            offset,
            table,
            values,
            element,
            inside[:, None] & (k[None, :] < K),
            NESTED,
            BLOCK,
        )
        acc = tl.dot(weight.to(xs.dtype), tl.trans(xs), acc, input_precision="ieee")
    return acc
