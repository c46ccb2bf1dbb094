"""`grad W` at few tokens, with W read in 4 bits: the gradient of a 4-bit linear layer to its input.

The sum runs over N, along which scales change from row to row, so weights are decoded to `value * scale`, rounded
once to grad's dtype as in the reference, before they enter the product.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kbit.formats.codebooks import codebook
from kbit.kernels.triton import tiles
from kbit.kernels.triton.common import NO_FMA, as_rows, decode_elements, on_device, scales_of


@triton.jit(do_not_specialize=["M"])  # one compilation for every number of tokens
def linear_4bit_grad_input_kernel(
    grad,
    packed,
    absmax,
    nested_absmax,
    offset,
    scale_table,
    values,
    out,
    M,
    N,
    K,
    stride_grad,
    NESTED: tl.constexpr,
    BLOCK: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    # One program: BM tokens by BK input features; it walks over N.
    k = (tl.program_id(0) * BK + tl.arange(0, BK)).to(tl.int64)
    m = (tl.program_id(1) * BM + tl.arange(0, BM)).to(tl.int64)
    acc = tl.zeros((BM, BK), tl.float32)
    for step in range(0, tl.cdiv(N, BN)):
        n = step * BN + tl.arange(0, BN)
        g = tl.load(grad + m[:, None] * stride_grad + n[None, :], mask=(m[:, None] < M) & (n[None, :] < N), other=0.0)
        element = n[:, None].to(tl.int64) * K + k[None, :]
        inside = (n[:, None] < N) & (k[None, :] < K)
        weight = decode_elements(
            packed, absmax, nested_absmax, offset, scale_table, values, element, inside, NESTED, BLOCK
        )
        acc = tl.dot(g, weight.to(g.dtype), acc, input_precision="ieee")
    tl.store(out + m[:, None] * K + k[None, :], acc.to(out.dtype.element_ty), mask=(m[:, None] < M) & (k[None, :] < K))


def linear_4bit_grad_input(
    grad: Tensor,
    weight: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    name: str,
    block_size: int,
    k: int,
    tile: tiles.Tile | None = None,
) -> Tensor:
    """grad: `[..., N]` in fp32, fp16 or bf16; weight: packed codes of `W [N, K]` in either layout -> `[..., K]`."""
    n = grad.shape[-1]
    rows = as_rows(grad)
    m = rows.shape[0]
    out = torch.empty((*grad.shape[:-1], k), dtype=grad.dtype, device=grad.device)
    if not out.numel():
        return out
    if n == 0:
        return out.zero_()
    tile = tile or tiles.choose("linear_4bit_grad_input", grad, m, n, k)
    scales = scales_of(absmax, nested_absmax, nested_offset)
    with on_device(grad):
        linear_4bit_grad_input_kernel[(triton.cdiv(k, tile.bk), triton.cdiv(m, tile.bm))](
            rows,
            weight.contiguous(),
            scales.absmax,
            scales.nested_absmax,
            scales.offset,
            scales.table,
            codebook(name, grad.device),
            out,
            m,
            n,
            k,
            rows.stride(0),
            NESTED=scales.nested,
            BLOCK=block_size,
            BM=tile.bm,
            BN=tile.bn,
            BK=tile.bk,
            num_warps=tile.warps,
            num_stages=tile.stages,
            **NO_FMA,
        )
    return out
