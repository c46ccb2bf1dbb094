"""LLM.int8() (arXiv 2208.07339) at many tokens, without a look at the data from the host.

Three launches. `quantize_int8` gives every row of x its scale and codes, outlier elements left out, and marks their
columns. `outlier_columns` makes a list of the marked columns and its length, on the device. The product multiplies all
codes in int8, then adds, for each column c of the list, `(x[m, c] - code[m, c] * scale[m]) * W[n, c]` in x's dtype:
the int8 share of an outlier column is taken back and the column counts as it is. The list has room for every column,
so there is nothing to overflow, and its order is that of the columns, so results repeat bit for bit.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kbit.kernels.triton import tiles
from kbit.kernels.triton.common import NO_FMA, as_float, as_rows, on_device
from kbit.kernels.triton.linear_8bit import finish
from kbit.kernels.triton.quantize_int8 import quantize_rows

# The most products of 127 * 127 that an int32 sum holds.
MAX_K = (2**31 - 1) // 127**2


@triton.jit
def outlier_columns_kernel(flags, columns, count, K, TILE: tl.constexpr):
    total = 0
    for begin in range(0, K, TILE):
        k = begin + tl.arange(0, TILE)
        flag = tl.load(flags + k, mask=k < K, other=0).to(tl.int32)
        tl.store(columns + total + tl.cumsum(flag, axis=0) - 1, k, mask=flag != 0)
        total += tl.sum(flag, axis=0)
    tl.store(count, total)


@triton.jit(do_not_specialize=["M"])  # one compilation for every number of tokens
def llm_int8_kernel(
    codes,
    rows,
    x,
    weight,
    absmax,
    bias,
    columns,
    count,
    out,
    M,
    N,
    K,
    stride_codes,
    stride_x,
    limit,
    OUTLIERS: tl.constexpr,
    BIAS: tl.constexpr,
    WHOLE: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    BC: tl.constexpr,
    GROUP: tl.constexpr,
):
    # Programs in groups of GROUP tiles of tokens, so that those at work at one time share what they read.
    tiles_m = tl.cdiv(M, BM)
    tiles_n = tl.cdiv(N, BN)
    group = tl.program_id(0) // (GROUP * tiles_n)
    height = tl.minimum(tiles_m - group * GROUP, GROUP)
    inner = tl.program_id(0) % (GROUP * tiles_n)
    m = ((group * GROUP + inner % height) * BM + tl.arange(0, BM)).to(tl.int64)
    n = ((inner // height) * BN + tl.arange(0, BN)).to(tl.int64)
    # Rows beyond M or N read the last one again; their sums are never stored.
    m_in, n_in = tl.minimum(m, M - 1), tl.minimum(n, N - 1)
    k = tl.arange(0, BK)
    a_at = codes + m_in[:, None] * stride_codes + k[None, :]
    w_at = weight + n_in[None, :] * K + k[:, None]
    found = 0
    if OUTLIERS:
        found = tl.load(count)
    acc = tl.zeros((BM, BN), tl.int32)
    # With too many outlier columns all of them are multiplied as they are, below.
    steps = tl.where(found > limit, 0, tl.cdiv(K, BK))
    for step in range(0, steps):
        if WHOLE:
            a, w = tl.load(a_at), tl.load(w_at)
        else:
            a = tl.load(a_at, mask=k[None, :] < K - step * BK, other=0)
            w = tl.load(w_at, mask=k[:, None] < K - step * BK, other=0)
        acc = tl.dot(a, w, acc, out_dtype=tl.int32)
        a_at += BK
        w_at += BK
    scale = tl.load(rows + m_in) * tl.full((), 0.007874015748031496, tl.float32)
    total = acc.to(tl.float32) * scale[:, None]
    if OUTLIERS:
        wide = tl.arange(0, 2 * BC)
        for step in range(0, tl.where(found > limit, tl.cdiv(K, 2 * BC), 0)):
            inside = wide < K - step * 2 * BC
            value = tl.load(
                x + m_in[:, None] * stride_x + step * 2 * BC + wide[None, :], mask=inside[None, :], other=0.0
            )
            w = tl.load(weight + n_in[None, :] * K + step * 2 * BC + wide[:, None], mask=inside[:, None], other=0)
            total = tl.dot(value, w.to(value.dtype), total, input_precision="ieee")
        for begin in range(0, tl.where(found > limit, 0, found), BC):
            c = begin + tl.arange(0, BC)
            column = tl.load(columns + c, mask=c < found, other=0)
            here = (c < found)[None, :] & (m[:, None] < M)
            value = tl.load(x + m_in[:, None] * stride_x + column[None, :], mask=here, other=0.0)
            code = tl.load(codes + m_in[:, None] * stride_codes + column[None, :], mask=here, other=0)
            rest = (value.to(tl.float32) - code.to(tl.float32) * scale[:, None]).to(value.dtype)
            w = tl.load(weight + n_in[None, :] * K + column[:, None], mask=(c < found)[:, None], other=0)
            total = tl.dot(rest, w.to(value.dtype), total, input_precision="ieee")
    total = finish(total, absmax, bias, n, N, BIAS)
    tl.store(
        out + m[:, None] * N + n[None, :], total.to(out.dtype.element_ty), mask=(m[:, None] < M) & (n[None, :] < N)
    )


def quantize_activations(x: Tensor, threshold: float) -> tuple[Tensor, Tensor, Tensor | None]:
    """x `[M, K]` -> (codes int8 `[M, K]` on rows of 16-byte multiples, row scales fp32 `[M]`, flags uint8 `[K]`)."""
    m, k = x.shape
    codes = torch.empty((m, -(-k // 16) * 16), dtype=torch.int8, device=x.device)[:, :k]
    rows = torch.empty(m, dtype=torch.float32, device=x.device)
    flags = torch.zeros(k, dtype=torch.uint8, device=x.device) if threshold > 0 else None
    quantize_rows(x, codes, rows, flags, threshold)
    return codes, rows, flags


def llm_int8(
    x: Tensor,
    weight: Tensor,
    absmax: Tensor,
    bias: Tensor | None,
    threshold: float,
    tile: tiles.Tile | None = None,
    limit: int = MAX_K,
) -> Tensor:
    """x: `[..., K]` in fp32, fp16 or bf16, K at most MAX_K; weight: int8 `[N, K]`; absmax: fp32 (or its bits) `[N]`.

    Returns `[..., N]` in x's dtype. threshold: magnitudes from which a column is an outlier; 0: none. limit: outlier
    columns beyond which all columns are multiplied as they are.
    """
    n, k = weight.shape
    inner = as_rows(x)
    m = inner.shape[0]
    out = torch.empty((*x.shape[:-1], n), dtype=x.dtype, device=x.device)
    if not out.numel():
        return out
    if k == 0:
        return out.zero_() if bias is None else out.copy_(bias.expand_as(out))
    tile = tile or tiles.choose("llm_int8", x, m, n, k)
    codes, rows, flags = quantize_activations(inner, threshold)
    columns = count = rows
    with on_device(x):
        if flags is not None:
            found = torch.empty(k + 1, dtype=torch.int32, device=x.device)
            columns, count = found[1:], found
            outlier_columns_kernel[(1,)](flags, columns, count, k, TILE=4096, num_warps=8)
        llm_int8_kernel[(triton.cdiv(m, tile.bm) * triton.cdiv(n, tile.bn),)](
            codes,
            rows,
            inner,
            weight.contiguous(),
            as_float(absmax),
            out if bias is None else bias,
            columns,
            count,
            out,
            m,
            n,
            k,
            codes.stride(0),
            inner.stride(0),
            limit,
            OUTLIERS=flags is not None,
            BIAS=bias is not None,
            WHOLE=k % tile.bk == 0,
            BM=tile.bm,
            BN=tile.bn,
            BK=tile.bk,
            BC=16,
            GROUP=8,
            num_warps=tile.warps,
            num_stages=tile.stages,
            **NO_FMA,
        )
    return out
