"""`x W^T + bias` at few tokens, with W read in int8 and x as it is: bound by the bytes of the weight.

A code of int8 is exact in bf16 and in fp16, so codes enter the matrix units as they are and the row scale of W is
applied once, to the fp32 sum. At one token the product is a sum along K in every thread instead.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kbit.kernels.triton import tiles
from kbit.kernels.triton.common import NO_FMA, as_float, as_rows, on_device
from kbit.kernels.triton.linear_4bit import add_splits_kernel


@triton.jit
def finish(acc, absmax, bias, n, N, BIAS: tl.constexpr):
    """`acc [M, N]` fp32 of codes -> the product: times absmax / 127 of each out feature, plus bias."""
    scale = tl.load(absmax + n, mask=n < N, other=0.0) * tl.full((), 0.007874015748031496, tl.float32)
    acc = acc * scale[None, :]
    if BIAS:
        acc += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    return acc


@triton.jit(do_not_specialize=["M"])  # one compilation for every number of tokens
def linear_8bit_kernel(
    x,
    weight,
    absmax,
    bias,
    out,
    M,
    N,
    K,
    stride_x,
    steps_a_split,
    BIAS: tl.constexpr,
    LEFT: tl.constexpr,
    WHOLE: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    SPLIT: tl.constexpr,
):
    # LEFT: out^T = W x^T, which lets decoded weights feed Hopper's matrix units from registers. WHOLE: K is a multiple
    # of BK, so nothing along K needs a mask.
    n = (tl.program_id(0) * BN + tl.arange(0, BN)).to(tl.int64)
    m = (tl.program_id(1) * BM + tl.arange(0, BM)).to(tl.int64)
    split = tl.program_id(2)
    begin = split * steps_a_split
    end = tl.minimum(begin + steps_a_split, tl.cdiv(K, BK))
    k = begin * BK + tl.arange(0, BK)
    # Rows beyond N read row N - 1 again: their sums are never stored, and no mask slows the stream of weights.
    w_at = weight + tl.minimum(n, N - 1)[:, None] * K + k[None, :]
    x_at = x + m[:, None] * stride_x + k[None, :]
    if LEFT:
        acc = tl.zeros((BN, BM), tl.float32)
    else:
        acc = tl.zeros((BM, BN), tl.float32)
    for step in range(begin, end):
        if WHOLE:
            w = tl.load(w_at)
            xs = tl.load(x_at, mask=m[:, None] < M, other=0.0)
        else:
            left = K - step * BK
            w = tl.load(w_at, mask=tl.arange(0, BK)[None, :] < left, other=0)
            xs = tl.load(x_at, mask=(m[:, None] < M) & (tl.arange(0, BK)[None, :] < left), other=0.0)
        w = w.to(xs.dtype)
        if LEFT:
            acc = tl.dot(w, tl.trans(xs), acc, input_precision="ieee")
        else:
            acc = tl.dot(xs, tl.trans(w), acc, input_precision="ieee")
        w_at += BK
        x_at += BK
    if LEFT:
        acc = tl.trans(acc)
    if SPLIT == 1:
        acc = finish(acc, absmax, bias, n, N, BIAS)
    else:
        acc = finish(acc, absmax, bias, n, N, False)
    place = out + split.to(tl.int64) * M * N + m[:, None] * N + n[None, :]
    tl.store(place, acc.to(out.dtype.element_ty), mask=(m[:, None] < M) & (n[None, :] < N))


@triton.jit
def linear_8bit_vector_kernel(
    x,
    weight,
    absmax,
    bias,
    out,
    N,
    K,
    BIAS: tl.constexpr,
    WHOLE: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    STAGES: tl.constexpr,
):
    # One token: BN out features, every thread sums its share of K.
    n = (tl.program_id(0) * BN + tl.arange(0, BN)).to(tl.int64)
    k = tl.arange(0, BK)
    w_at = weight + tl.minimum(n, N - 1)[:, None] * K + k[None, :]
    acc = tl.zeros((BN, BK), tl.float32)
    for step in tl.range(0, tl.cdiv(K, BK), num_stages=STAGES):
        if WHOLE:
            w = tl.load(w_at)
            xs = tl.load(x + k)
        else:
            inside = k < K - step * BK
            w = tl.load(w_at, mask=inside[None, :], other=0)
            xs = tl.load(x + k, mask=inside, other=0.0)
        acc += w.to(tl.float32) * xs.to(tl.float32)[None, :]
        w_at += BK
        x += BK
    total = finish(tl.sum(acc, axis=1)[None, :], absmax, bias, n, N, BIAS)
    tl.store(out + n[None, :], total.to(out.dtype.element_ty), mask=n[None, :] < N)


def linear_8bit(
    x: Tensor, weight: Tensor, absmax: Tensor, bias: Tensor | None, tile: tiles.Tile | None = None
) -> Tensor:
    """x: `[..., K]` in fp32, fp16 or bf16; weight: int8 `[N, K]`; absmax: fp32 (or its bits) `[N]` -> `[..., N]`."""
    n, k = weight.shape
    rows = as_rows(x)
    m = rows.shape[0]
    out = torch.empty((*x.shape[:-1], n), dtype=x.dtype, device=x.device)
    if not out.numel():
        return out
    if k == 0:
        return out.zero_() if bias is None else out.copy_(bias.expand_as(out))
    tile = tile or tiles.choose("linear_8bit", x, m, n, k)
    absmax, weight = as_float(absmax), weight.contiguous()
    # fp32 products run on the FMA units, unrolled: long steps would only take long to compile.
    bk = min(tile.bk, 32) if x.dtype == torch.float32 and tile.bm > 1 else tile.bk
    some = out if bias is None else bias
    if m == 1 and tile.bm == 1:
        with on_device(x):
            linear_8bit_vector_kernel[(triton.cdiv(n, tile.bn),)](
                rows,
                weight,
                absmax,
                some,
                out,
                n,
                k,
                BIAS=bias is not None,
                WHOLE=k % tile.bk == 0,
                BN=tile.bn,
                BK=tile.bk,
                STAGES=tile.stages,
                num_warps=tile.warps,
            )
        return out
    steps = triton.cdiv(k, bk)
    steps_a_split = triton.cdiv(steps, max(1, min(tile.split, steps)))
    split = triton.cdiv(steps, steps_a_split)
    parts = out if split == 1 else torch.empty((split, m, n), dtype=torch.float32, device=x.device)
    bm = max(16, tile.bm)
    with on_device(x):
        linear_8bit_kernel[(triton.cdiv(n, tile.bn), triton.cdiv(m, bm), split)](
            rows,
            weight,
            absmax,
            some,
            parts,
            m,
            n,
            k,
            rows.stride(0),
            steps_a_split,
            BIAS=bias is not None,
            LEFT=tile.left,
            WHOLE=k % bk == 0,
            BM=bm,
            BN=tile.bn,
            BK=bk,
            SPLIT=split,
            num_warps=tile.warps,
            num_stages=tile.stages,
            **NO_FMA,
        )
        if split > 1:
            add_splits_kernel[(triton.cdiv(m * n, 1024),)](
                parts, some, out, m * n, n, BIAS=bias is not None, SPLIT=split, TILE=1024, **NO_FMA
            )
    return out
