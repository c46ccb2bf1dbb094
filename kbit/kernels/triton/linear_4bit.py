"""`x W^T + bias` at few tokens, with W read in 4 bits: decoded in registers, multiplied on the matrix units.

out^T = W x^T: the weight is the left operand, so that decoded values feed the matrix units without a detour. A step
covers at most one block of the K dimension and scales its accumulator, which is exact in fp32; weights enter the
product as codebook values rounded to x's dtype. Where N / BN programs cannot fill the device, K is split too and a
second kernel adds the parts: no atomics, so results repeat bit for bit.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from kbit.formats.codebooks import codebook
from kbit.kernels.triton import tiles
from kbit.kernels.triton.common import NO_FMA, add_step, as_rows, on_device, scales_of


@functools.cache
def values_as(name: str, device: torch.device, dtype: torch.dtype) -> Tensor:
    """The 16 codebook values in the dtype of the product."""
    return codebook(name, device).to(dtype)


@triton.jit(do_not_specialize=["M"])  # one compilation for every number of tokens
def linear_4bit_kernel(
    x,
    packed,
    absmax,
    nested_absmax,
    offset,
    scale_table,
    values,
    bias,
    out,
    M,
    N,
    K,
    stride_x,
    steps_a_split,
    NESTED: tl.constexpr,
    BIAS: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    SPLIT: tl.constexpr,
):
    n = (tl.program_id(0) * BN + tl.arange(0, BN)).to(tl.int64)
    m = (tl.program_id(1) * BM + tl.arange(0, BM)).to(tl.int64)
    split = tl.program_id(2)
    begin = split * steps_a_split
    end = tl.minimum(begin + steps_a_split, tl.cdiv(K, BK))
    acc = tl.zeros((BN, BM), tl.float32)
    for step in range(begin, end):
        k = step * BK + tl.arange(0, BK)
        xs = tl.load(x + m[:, None] * stride_x + k[None, :], mask=(m[:, None] < M) & (k[None, :] < K), other=0.0)
        acc = add_step(
            acc, xs, packed, absmax, nested_absmax, offset, scale_table, values,
            n, step, K, n < N, NESTED, BLOCK, ROWS, BM, BK,
        )  # fmt: skip
    if BIAS and SPLIT == 1:
        acc += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[:, None]
    place = out + split.to(tl.int64) * M * N + m[None, :] * N + n[:, None]
    tl.store(place, acc.to(out.dtype.element_ty), mask=(m[None, :] < M) & (n[:, None] < N))


@triton.jit
def add_splits_kernel(parts, bias, out, count, N, BIAS: tl.constexpr, SPLIT: tl.constexpr, TILE: tl.constexpr):
    # parts fp32 [SPLIT, M, N] -> out [M, N]
    i = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    total = tl.zeros((TILE,), tl.float32)
    for split in range(SPLIT):
        total += tl.load(parts + split * count + i, mask=i < count, other=0.0)
    if BIAS:
        total += tl.load(bias + i % N, mask=i < count, other=0.0).to(tl.float32)
    tl.store(out + i, total.to(out.dtype.element_ty), mask=i < count)


def stages_of(stages: int, row_layout: bool) -> int:
    """Stages of the product's loop. The flat layout keeps every element's scale in flight: a third stage of those takes
    110 KB of shared memory, more than the 99 KB of compute capability 8.6 and 8.9."""
    return stages if row_layout else min(2, stages)


def linear_4bit(
    x: Tensor,
    weight: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    bias: Tensor | None,
    name: str,
    block_size: int,
    n: int,
    tile: tiles.Tile | None = None,
) -> Tensor:
    """x: `[..., K]` in fp32, fp16 or bf16; weight: packed codes of `W [N, K]` in either layout -> `[..., N]`."""
    k = x.shape[-1]
    rows = as_rows(x)
    m = rows.shape[0]
    out = torch.empty((*x.shape[:-1], n), dtype=x.dtype, device=x.device)
    if not out.numel():
        return out
    if k == 0:
        return out.zero_() if bias is None else out.copy_(bias.expand_as(out))
    row_layout = k % block_size == 0
    tile = tile or tiles.choose("linear_4bit", x, m, n, k)
    bk = min(tile.bk, block_size) if row_layout else min(tile.bk, 64)
    steps = triton.cdiv(k, bk)
    split = max(1, min(tile.split, steps))
    steps_a_split = triton.cdiv(steps, split)
    split = triton.cdiv(steps, steps_a_split)
    scales = scales_of(absmax, nested_absmax, nested_offset)
    parts = out if split == 1 else torch.empty((split, m, n), dtype=torch.float32, device=x.device)
    grid = (triton.cdiv(n, tile.bn), triton.cdiv(m, tile.bm), split)
    with on_device(x):
        linear_4bit_kernel[grid](
            rows,
            weight.contiguous(),
            scales.absmax,
            scales.nested_absmax,
            scales.offset,
            scales.table,
            values_as(name, x.device, x.dtype if row_layout else torch.float32),
            out if bias is None else bias,
            parts,
            m,
            n,
            k,
            rows.stride(0),
            steps_a_split,
            NESTED=scales.nested,
            BIAS=bias is not None,
            BLOCK=block_size,
            ROWS=row_layout,
            BM=tile.bm,
            BN=tile.bn,
            BK=bk,
            SPLIT=split,
            num_warps=tile.warps,
            num_stages=stages_of(tile.stages, row_layout),
            **NO_FMA,
        )
        if split > 1:
            add_splits_kernel[(triton.cdiv(m * n, 1024),)](
                parts,
                out if bias is None else bias,
                out,
                m * n,
                n,
                BIAS=bias is not None,
                SPLIT=split,
                TILE=1024,
                **NO_FMA,
            )
    return out
