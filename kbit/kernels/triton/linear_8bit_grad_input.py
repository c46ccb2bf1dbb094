"""`grad W` with W read in int8: the gradient of an 8-bit linear layer to its input.

The sum runs over N, along which the scales change, so weights are decoded and rounded once to grad's dtype, as in the
reference, before they enter the product.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kbit.kernels.triton import tiles
from kbit.kernels.triton.common import NO_FMA, as_float, as_rows, on_device
from kbit.kernels.triton.dequantize_int8 import decode_int8


@triton.jit(do_not_specialize=["M"])  # one compilation for every number of tokens
def linear_8bit_grad_input_kernel(
    grad,
    weight,
    absmax,
    out,
    M,
    N,
    K,
    stride_grad,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    # One program: BM tokens by BK input features; it walks over N.
    k = tl.program_id(0) * BK + tl.arange(0, BK)
    m = (tl.program_id(1) * BM + tl.arange(0, BM)).to(tl.int64)
    acc = tl.zeros((BM, BK), tl.float32)
    for step in range(0, tl.cdiv(N, BN)):
        n = step * BN + tl.arange(0, BN)
        g = tl.load(grad + m[:, None] * stride_grad + n[None, :], mask=(m[:, None] < M) & (n[None, :] < N), other=0.0)
        inside = (n[:, None] < N) & (k[None, :] < K)
        code = tl.load(weight + n[:, None].to(tl.int64) * K + k[None, :], mask=inside, other=0)
        scale = tl.load(absmax + n, mask=n < N, other=0.0)
        acc = tl.dot(g, decode_int8(code, scale[:, None]).to(g.dtype), acc, input_precision="ieee")
    tl.store(out + m[:, None] * K + k[None, :], acc.to(out.dtype.element_ty), mask=(m[:, None] < M) & (k[None, :] < K))


def linear_8bit_grad_input(grad: Tensor, weight: Tensor, absmax: Tensor, tile: tiles.Tile | None = None) -> Tensor:
    """grad: `[..., N]` in fp32, fp16 or bf16; weight: int8 `[N, K]` with scales absmax `[N]` -> `[..., K]`."""
    n, k = weight.shape
    rows = as_rows(grad)
    m = rows.shape[0]
    out = torch.empty((*grad.shape[:-1], k), dtype=grad.dtype, device=grad.device)
    if not out.numel():
        return out
    if n == 0:
        return out.zero_()
    tile = tile or tiles.choose("linear_8bit_grad_input", grad, m, n, k)
    with on_device(grad):
        linear_8bit_grad_input_kernel[(triton.cdiv(k, tile.bk), triton.cdiv(m, tile.bm))](
            rows,
            weight.contiguous(),
            as_float(absmax),
            out,
            m,
            n,
            k,
            rows.stride(0),
            BM=tile.bm,
            BN=min(tile.bn, 32) if grad.dtype == torch.float32 else tile.bn,
            BK=tile.bk,
            num_warps=tile.warps,
            num_stages=tile.stages,
            **NO_FMA,
        )
    return out
