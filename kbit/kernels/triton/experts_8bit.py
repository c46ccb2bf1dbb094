"""Products over experts with int8 weights `W [E, N, K]`: rows sorted by expert, the routing read on the device.

Which expert and which rows a program serves follows from `offsets`, where the rows of each expert end: nothing is known
on the host, so the grid has room for the most tiles there can be, and the rest of the programs return. The activations
stay as they are: an expert sees few tokens, and the bytes of its weight set the time.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kbit.kernels.triton import tiles
from kbit.kernels.triton.common import NO_FMA, as_float, as_rows, on_device
from kbit.kernels.triton.dequantize_int8 import decode_int8
from kbit.kernels.triton.linear_8bit import finish


@triton.jit
def rows_of_tile(offsets, tile, S, E, BM: tl.constexpr, EP: tl.constexpr):
    """(expert, first row, row behind the last) of a tile. Rows of no expert are those of expert E; a tile that does not
    exist is one of an expert beyond E. EP: a power of two above E."""
    e = tl.arange(0, EP)
    end = tl.where(e < E, tl.load(offsets + e, mask=e < E, other=0), S)
    begin = tl.load(offsets + e - 1, mask=(e > 0) & (e <= E), other=0)
    count = tl.where(e <= E, (tl.maximum(end - begin, 0) + BM - 1) // BM, 0)
    upto = tl.cumsum(count, axis=0)
    expert = tl.sum((upto <= tile).to(tl.int32), axis=0)
    first = tl.sum(tl.where(e == expert, begin + (tile - upto + count) * BM, 0), axis=0)
    return expert, first, tl.sum(tl.where(e == expert, end, 0), axis=0)


@triton.jit(do_not_specialize=["S"])  # one compilation for every number of rows
def experts_8bit_kernel(
    x,
    offsets,
    weight,
    absmax,
    bias,
    out,
    S,
    E,
    N,
    K,
    stride_x,
    BIAS: tl.constexpr,
    WHOLE: tl.constexpr,
    EP: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    expert, first, stop = rows_of_tile(offsets, tl.program_id(1), S, E, BM, EP)
    if expert > E:
        return
    n = (tl.program_id(0) * BN + tl.arange(0, BN)).to(tl.int64)
    s = first.to(tl.int64) + tl.arange(0, BM)
    place = out + s[:, None] * N + n[None, :]
    inside = (s[:, None] < stop) & (n[None, :] < N)
    if expert == E:
        tl.store(place, tl.zeros((BM, BN), out.dtype.element_ty), mask=inside)
        return
    k = tl.arange(0, BK)
    at = expert.to(tl.int64) * N
    w_at = weight + (at + tl.minimum(n, N - 1))[:, None] * K + k[None, :]
    x_at = x + s[:, None] * stride_x + k[None, :]
    acc = tl.zeros((BM, BN), tl.float32)
    for step in range(0, tl.cdiv(K, BK)):
        if WHOLE:
            w = tl.load(w_at)
            xs = tl.load(x_at, mask=s[:, None] < stop, other=0.0)
        else:
            left = k[None, :] < K - step * BK
            w = tl.load(w_at, mask=left, other=0)
            xs = tl.load(x_at, mask=(s[:, None] < stop) & left, other=0.0)
        acc = tl.dot(xs, tl.trans(w.to(xs.dtype)), acc, input_precision="ieee")
        w_at += BK
        x_at += BK
    acc = finish(acc, absmax + at, bias + (at if BIAS else 0), n, N, BIAS)
    tl.store(place, acc.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["S"])  # one compilation for every number of rows
def experts_8bit_grad_input_kernel(
    grad,
    offsets,
    weight,
    absmax,
    out,
    S,
    E,
    N,
    K,
    stride_grad,
    EP: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    expert, first, stop = rows_of_tile(offsets, tl.program_id(1), S, E, BM, EP)
    if expert > E:
        return
    k = tl.program_id(0) * BK + tl.arange(0, BK)
    s = first.to(tl.int64) + tl.arange(0, BM)
    acc = tl.zeros((BM, BK), tl.float32)
    if expert < E:
        at = expert.to(tl.int64) * N
        for step in range(0, tl.cdiv(N, BN)):
            n = step * BN + tl.arange(0, BN)
            some = (s[:, None] < stop) & (n[None, :] < N)
            g = tl.load(grad + s[:, None] * stride_grad + n[None, :], mask=some, other=0.0)
            inside = (n[:, None] < N) & (k[None, :] < K)
            code = tl.load(weight + (at + n)[:, None] * K + k[None, :], mask=inside, other=0)
            scale = tl.load(absmax + at + n, mask=n < N, other=0.0)
            acc = tl.dot(g, decode_int8(code, scale[:, None]).to(g.dtype), acc, input_precision="ieee")
    inside = (s[:, None] < stop) & (k[None, :] < K)
    tl.store(out + s[:, None] * K + k[None, :], acc.to(out.dtype.element_ty), mask=inside)


def _rows_a_tile(rows: int, experts: int) -> int:
    """Near the rows an expert has on average; a tile of its own for an expert with few."""
    return 16 if rows <= 16 * experts else 32 if rows <= 48 * experts else 64


def tile_count(rows: int, experts: int, bm: int) -> int:
    """The most tiles that rows sorted by expert can need, those of no expert included."""
    return rows // bm + min(rows, experts + 1)


def experts_8bit(
    x: Tensor, offsets: Tensor, weight: Tensor, absmax: Tensor, bias: Tensor | None, tile: tiles.Tile | None = None
) -> Tensor:
    """x: `[S, K]` in fp32, fp16 or bf16; offsets: int32 `[E]`; weight: int8 `[E, N, K]`; absmax: fp32 (or its bits)
    `[E, N]`; bias: `[E, N]` -> `[S, N]`."""
    experts, n, k = weight.shape
    rows = as_rows(x)
    s = rows.shape[0]
    out = torch.empty((s, n), dtype=x.dtype, device=x.device)
    if not out.numel():
        return out
    bm = tile.bm if tile else _rows_a_tile(s, experts)
    tile = tile or tiles.choose("linear_8bit", x, bm, n, k)
    bk = min(tile.bk, 32) if x.dtype == torch.float32 else tile.bk
    with on_device(x):
        experts_8bit_kernel[(triton.cdiv(n, tile.bn), tile_count(s, experts, bm))](
            rows,
            offsets.contiguous(),
            weight.contiguous(),
            as_float(absmax),
            out if bias is None else bias.contiguous(),
            out,
            s,
            experts,
            n,
            k,
            rows.stride(0),
            BIAS=bias is not None,
            WHOLE=k % bk == 0,
            EP=triton.next_power_of_2(experts + 1),
            BM=bm,
            BN=tile.bn,
            BK=bk,
            num_warps=tile.warps,
            num_stages=tile.stages,
            **NO_FMA,
        )
    return out


def experts_8bit_grad_input(
    grad: Tensor, offsets: Tensor, weight: Tensor, absmax: Tensor, tile: tiles.Tile | None = None
) -> Tensor:
    """grad: `[S, N]` in fp32, fp16 or bf16; the others as in `experts_8bit` -> `[S, K]`."""
    experts, n, k = weight.shape
    rows = as_rows(grad)
    s = rows.shape[0]
    out = torch.empty((s, k), dtype=grad.dtype, device=grad.device)
    if not out.numel():
        return out
    bm = tile.bm if tile else _rows_a_tile(s, experts)
    tile = tile or tiles.choose("linear_8bit_grad_input", grad, bm, n, k)
    with on_device(grad):
        experts_8bit_grad_input_kernel[(triton.cdiv(k, tile.bk), tile_count(s, experts, bm))](
            rows,
            offsets.contiguous(),
            weight.contiguous(),
            as_float(absmax),
            out,
            s,
            experts,
            n,
            k,
            rows.stride(0),
            EP=triton.next_power_of_2(experts + 1),
            BM=bm,
            BN=min(tile.bn, 32) if grad.dtype == torch.float32 else tile.bn,
            BK=tile.bk,
            num_warps=tile.warps,
            num_stages=tile.stages,
            **NO_FMA,
        )
    return out
