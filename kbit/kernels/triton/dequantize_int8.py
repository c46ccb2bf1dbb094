"""Row-wise int8 decoding: `(code * absmax) * fp32(1 / 127)` in fp32, then one cast, as in `kbit.formats.blocks`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kbit.kernels.triton.common import NO_FMA, as_float, on_device

_TILE = 4096  # elements a program handles at most


@triton.jit
def decode_int8(code, absmax):
    """fp32 weights of int8 codes and their broadcast fp32 row scales; two roundings."""
    return (code.to(tl.float32) * absmax) * tl.full((), 0.007874015748031496, tl.float32)


@triton.jit
def dequantize_int8_kernel(codes, absmax, out, rows, K, ROWS: tl.constexpr, BK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    k = tl.program_id(1) * BK + tl.arange(0, BK)
    inside = (row[:, None] < rows) & (k[None, :] < K)
    place = row[:, None] * K + k[None, :]
    scale = tl.load(absmax + row, mask=row < rows, other=0.0)
    value = decode_int8(tl.load(codes + place, mask=inside, other=0), scale[:, None])
    tl.store(out + place, value.to(out.dtype.element_ty), mask=inside)


def dequantize_int8(codes: Tensor, absmax: Tensor, dtype: torch.dtype) -> Tensor:
    """codes: int8 `[..., K]`, absmax: fp32 (or its bits) `[...]` -> `[..., K]` in `dtype` (fp32, fp16 or bf16)."""
    out = torch.empty(codes.shape, dtype=dtype, device=codes.device)
    if out.numel():
        k = codes.shape[-1]
        rows = codes.numel() // k
        bk = min(2048, triton.next_power_of_2(k))
        tile = max(1, _TILE // bk)
        with on_device(codes):
            dequantize_int8_kernel[(triton.cdiv(rows, tile), triton.cdiv(k, bk))](
                codes.contiguous(), as_float(absmax), out, rows, k, ROWS=tile, BK=bk, num_warps=4, **NO_FMA
            )
    return out
