"""Row-wise int8 quantization, to the bit as `kbit.formats.blocks.quantize_int8`; for LLM.int8() without outliers.

One program reads a row once, takes its largest magnitude and writes its codes. For the activations of LLM.int8() the
magnitudes of at least `threshold` stay out of the row's scale, get code 0, and mark their column in `flags`.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from kbit.kernels.triton.common import NO_FMA, as_rows, on_device

_WHOLE_ROW = 16384  # features up to which a program holds its row in registers


@triton.jit
def magnitudes(value, threshold, OUTLIERS: tl.constexpr):
    """(bits of the magnitudes that count for the scale, mask of outliers). As integers they are in the order of the
    values, and NaN is the largest: a maximum over them keeps NaN, as torch's does."""
    size = tl.abs(value)
    bits = size.to(tl.int32, bitcast=True)
    outlier = size >= threshold
    if OUTLIERS:
        bits = tl.where(outlier, 0, bits)
    return bits, outlier


@triton.jit
def int8_codes(value, absmax):
    """round_half_even(value * (127 / absmax)), saturated, in fp32; 0 where absmax is 0 or NaN."""
    # 127 / absmax overflows for absmax below 3.7e-37; a power of two scales such a row without rounding it.
    boost = tl.where(absmax < 7.888609052210118e-31, 18446744073709551616.0, 1.0).to(tl.float32)
    # Two roundings, as torch divides a number by a tensor: the reciprocal, then the product.
    inverse = tl.where(absmax > 0, tl.div_rn(tl.full((), 1.0, tl.float32), absmax * boost) * 127.0, 0.0)
    scaled = (value * boost) * inverse
    scaled = tl.minimum(tl.maximum(scaled, -127.0), 127.0)
    magic = tl.full((), 12582912.0, tl.float32)  # 1.5 * 2^23: adding it rounds to an integer, halves to even
    return ((scaled + magic) - magic).to(tl.int8)


@triton.jit
def mark(flags, mask):
    """Set flags, but those that are set already: thousands of rows share a few outlier columns, and stores to one
    address wait for each other."""
    seen = tl.load(flags, mask=mask, other=1)
    tl.store(flags, tl.full(flags.shape, 1, tl.uint8), mask=mask & (seen == 0))


@triton.jit
def quantize_int8_kernel(
    x,
    codes,
    absmax,
    flags,
    threshold,
    K,
    stride_x,
    stride_codes,
    OUTLIERS: tl.constexpr,
    WHOLE: tl.constexpr,
    BK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    x += row * stride_x
    codes += row * stride_codes
    if WHOLE:
        k = tl.arange(0, BK)
        value = tl.load(x + k, mask=k < K, other=0.0).to(tl.float32)
        bits, outlier = magnitudes(value, threshold, OUTLIERS)
        scale = tl.max(bits, axis=0).to(tl.float32, bitcast=True)
        code = int8_codes(value, scale)
        if OUTLIERS:
            if tl.max(outlier.to(tl.int32), axis=0) > 0:
                mark(flags + k, outlier & (k < K))
            code = tl.where(outlier, 0, code)
        tl.store(codes + k, code, mask=k < K)
    else:
        most = tl.zeros((BK,), tl.int32)
        for begin in range(0, K, BK):
            k = begin + tl.arange(0, BK)
            value = tl.load(x + k, mask=k < K, other=0.0).to(tl.float32)
            bits, outlier = magnitudes(value, threshold, OUTLIERS)
            most = tl.maximum(most, bits)
            if OUTLIERS:
                mark(flags + k, outlier & (k < K))
        scale = tl.max(most, axis=0).to(tl.float32, bitcast=True)
        for begin in range(0, K, BK):
            k = begin + tl.arange(0, BK)
            value = tl.load(x + k, mask=k < K, other=0.0).to(tl.float32)
            code = int8_codes(value, scale)
            if OUTLIERS:
                code = tl.where(tl.abs(value) >= threshold, 0, code)
            tl.store(codes + k, code, mask=k < K)
    tl.store(absmax + row, scale)


def quantize_rows(x: Tensor, codes: Tensor, absmax: Tensor, flags: Tensor | None, threshold: float) -> None:
    """x: `[M, K]` with unit stride along K -> codes int8 `[M, K]` (rows may lie further apart), absmax fp32 `[M]`.

    flags: uint8 `[K]`, zeros; those of columns with a magnitude of at least `threshold` become 1. None: no outliers.
    """
    m, k = x.shape
    whole = k <= _WHOLE_ROW
    bk = max(128, triton.next_power_of_2(k)) if whole else 4096
    with on_device(x):
        quantize_int8_kernel[(m,)](
            x,
            codes,
            absmax,
            absmax if flags is None else flags,
            threshold,
            k,
            x.stride(0),
            codes.stride(0),
            OUTLIERS=flags is not None,
            WHOLE=whole,
            BK=bk,
            num_warps=max(1, min(16, bk // 512)),
            **NO_FMA,
        )


def quantize_int8(x: Tensor) -> tuple[Tensor, Tensor]:
    """x: `[..., K]`, any floating dtype -> codes int8 shaped like x, absmax fp32 `[...]`."""
    x = x.detach()
    codes = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    absmax = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
    k = x.shape[-1]
    if not k:
        return codes, absmax.zero_()
    if x.numel():
        rows = as_rows(x.float() if x.dtype == torch.float64 else x)
        quantize_rows(rows, codes.view(math.prod(x.shape[:-1]), k), absmax.view(-1), None, 0.0)
    return codes, absmax
