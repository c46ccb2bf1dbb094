"""Products of rows sorted by expert with the experts' weights in 4 bits: forward, and the gradient to the input.

A program finds its expert and its rows on the device, as in `experts_8bit`: tiles of BM rows are numbered through all
experts, and the grid has as many as there can be at most. Rows of no expert become 0. The rest is as in `linear_4bit`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kbit.formats.codebooks import codebook
from kbit.kernels.triton import tiles
from kbit.kernels.triton.common import NO_FMA, add_step, as_rows, decode_elements, on_device, scales_of
from kbit.kernels.triton.experts_8bit import rows_of_tile, tile_count
from kbit.kernels.triton.linear_4bit import add_splits_kernel, values_as


@triton.jit(do_not_specialize=["S"])  # one compilation for every number of rows
def experts_4bit_kernel(
    x,
    offsets,
    packed,
    absmax,
    nested_absmax,
    offset,
    scale_table,
    values,
    bias,
    out,
    S,
    E,
    N,
    K,
    stride_x,
    steps_a_split,
    EP: tl.constexpr,
    NESTED: tl.constexpr,
    BIAS: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    expert, first, stop = rows_of_tile(offsets, tl.program_id(1), S, E, BM, EP)
    if expert > E:
        return
    n = (tl.program_id(0) * BN + tl.arange(0, BN)).to(tl.int64)
    m = (first + tl.arange(0, BM)).to(tl.int64)
    row = expert.to(tl.int64) * N + n  # of the weights of all experts
    split = tl.program_id(2)
    begin = split * steps_a_split
    end = tl.where(expert < E, tl.minimum(begin + steps_a_split, tl.cdiv(K, BK)), begin)
    acc = tl.zeros((BN, BM), tl.float32)
    for step in range(begin, end):
        k = step * BK + tl.arange(0, BK)
        xs = tl.load(x + m[:, None] * stride_x + k[None, :], mask=(m[:, None] < stop) & (k[None, :] < K), other=0.0)
        acc = add_step(
            acc, xs, packed, absmax, nested_absmax, offset, scale_table, values,
            row, step, K, n < N, NESTED, BLOCK, ROWS, BM, BK,
        )  # fmt: skip
    if BIAS:
        here = (n < N) & (expert < E) & (split == 0)
        acc += tl.load(bias + row, mask=here, other=0.0).to(tl.float32)[:, None]
    place = out + split.to(tl.int64) * S * N + m[None, :] * N + n[:, None]
    tl.store(place, acc.to(out.dtype.element_ty), mask=(m[None, :] < stop) & (n[:, None] < N))


@triton.jit(do_not_specialize=["S"])  # one compilation for every number of rows
def experts_4bit_grad_input_kernel(
    grad,
    offsets,
    packed,
    absmax,
    nested_absmax,
    offset,
    scale_table,
    values,
    out,
    S,
    E,
    N,
    K,
    stride_grad,
    EP: tl.constexpr,
    NESTED: tl.constexpr,
    BLOCK: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    # One program: BM rows of one expert by BK input features; it walks over N.
    expert, first, stop = rows_of_tile(offsets, tl.program_id(1), S, E, BM, EP)
    if expert > E:
        return
    k = (tl.program_id(0) * BK + tl.arange(0, BK)).to(tl.int64)
    m = (first + tl.arange(0, BM)).to(tl.int64)
    acc = tl.zeros((BM, BK), tl.float32)
    for step in range(0, tl.where(expert < E, tl.cdiv(N, BN), 0)):
        n = step * BN + tl.arange(0, BN)
        g = tl.load(
            grad + m[:, None] * stride_grad + n[None, :], mask=(m[:, None] < stop) & (n[None, :] < N), other=0.0
        )
        element = (expert.to(tl.int64) * N + n[:, None]) * K + k[None, :]
        inside = (n[:, None] < N) & (k[None, :] < K)
        weight = decode_elements(
            packed, absmax, nested_absmax, offset, scale_table, values, element, inside, NESTED, BLOCK
        )
        acc = tl.dot(g, weight.to(g.dtype), acc, input_precision="ieee")
    place = out + m[:, None] * K + k[None, :]
    tl.store(place, acc.to(out.dtype.element_ty), mask=(m[:, None] < stop) & (k[None, :] < K))


def tokens_of_an_expert(rows: int, experts: int) -> int:
    """The rows that tiles should have room for: twice an expert's share, as routers are uneven."""
    return min(rows, 2 * -(-rows // max(experts, 1)))


def experts_4bit(
    x: Tensor,
    offsets: Tensor,
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
    """x: `[S, K]` in fp32, fp16 or bf16, rows sorted by expert; offsets: int32 `[E]`; weight: packed codes of
    `W [E, N, K]` in either layout; bias: `[E, N]` -> `[S, N]`."""
    (s, k), experts = x.shape, offsets.shape[0]
    out = torch.empty((s, n), dtype=x.dtype, device=x.device)
    if not out.numel():
        return out
    rows = as_rows(x)
    row_layout = k % block_size == 0
    tile = tile or tiles.choose("experts_4bit", x, tokens_of_an_expert(s, experts), n * min(s, experts), k)
    bk = min(tile.bk, block_size) if row_layout else min(tile.bk, 64)
    steps = max(1, triton.cdiv(k, bk))
    split = max(1, min(tile.split, steps))
    steps_a_split = triton.cdiv(steps, split)
    split = triton.cdiv(steps, steps_a_split)
    parts = out if split == 1 else torch.empty((split, s, n), dtype=torch.float32, device=x.device)
    scales = scales_of(absmax, nested_absmax, nested_offset)
    with on_device(x):
        experts_4bit_kernel[(triton.cdiv(n, tile.bn), tile_count(s, experts, tile.bm), split)](
            rows,
            offsets,
            weight.contiguous(),
            scales.absmax,
            scales.nested_absmax,
            scales.offset,
            scales.table,
            values_as(name, x.device, x.dtype if row_layout else torch.float32),
            out if bias is None else bias.contiguous(),
            parts,
            s,
            experts,
            n,
            k,
            rows.stride(0),
            steps_a_split,
            EP=triton.next_power_of_2(experts + 1),
            NESTED=scales.nested,
            BIAS=bias is not None,
            BLOCK=block_size,
            ROWS=row_layout,
            BM=tile.bm,
            BN=tile.bn,
            BK=bk,
            num_warps=tile.warps,
            num_stages=tile.stages,
            **NO_FMA,
        )
        if split > 1:
            add_splits_kernel[(triton.cdiv(s * n, 1024),)](
                parts, out, out, s * n, n, BIAS=False, SPLIT=split, TILE=1024, **NO_FMA
            )
    return out


def experts_4bit_grad_input(
    grad: Tensor,
    offsets: Tensor,
    weight: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    name: str,
    block_size: int,
    k: int,
    tile: tiles.Tile | None = None,
) -> Tensor:
    """grad: `[S, N]`, rows sorted by expert; the others as in `experts_4bit` -> `[S, K]`."""
    (s, n), experts = grad.shape, offsets.shape[0]
    out = torch.empty((s, k), dtype=grad.dtype, device=grad.device)
    if not out.numel():
        return out
    rows = as_rows(grad)
    tile = tile or tiles.choose("experts_4bit_grad_input", grad, tokens_of_an_expert(s, experts), n, k)
    scales = scales_of(absmax, nested_absmax, nested_offset)
    with on_device(grad):
        experts_4bit_grad_input_kernel[(triton.cdiv(k, tile.bk), tile_count(s, experts, tile.bm))](
            rows,
            offsets,
            weight.contiguous(),
            scales.absmax,
            scales.nested_absmax,
            scales.offset,
            scales.table,
            codebook(name, grad.device),
            out,
            s,
            experts,
            n,
            k,
            rows.stride(0),
            EP=triton.next_power_of_2(experts + 1),
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
