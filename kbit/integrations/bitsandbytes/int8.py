"""bitsandbytes.functional for LLM.int8(): row-wise int8 codes, their product, and back (arXiv 2208.07339)."""

from __future__ import annotations

import torch
from torch import Tensor

from kbit.formats.blocks import int8_codes
from kbit.ops.reference import int8_product

_ops = torch.ops.kbit
_INVERSE = 1.0 / 127.0


def int8_vectorwise_quant(A: Tensor, threshold: float = 0.0) -> tuple[Tensor, Tensor, Tensor | None]:
    """Row-wise int8 codes of `A [..., K]`.

    threshold: columns that hold a magnitude of at least this get code 0, and their outlier elements do not count for
    the row's absmax; 0 keeps every column. A is not changed.
    Returns codes int8 shaped like A, row absmax fp32 `[rows]`, and the outlier columns int64 (None without threshold).
    """
    if not A.is_floating_point():
        raise TypeError(f"int8_vectorwise_quant takes floating point input, got {A.dtype}")
    if threshold <= 0.0:
        codes, absmax = _ops.quantize_int8(A)
        return codes, absmax.reshape(-1), None
    values = A.detach().reshape(-1, A.shape[-1]).float()
    outlier = values.abs() >= threshold
    columns = outlier.any(dim=0)
    inner = values.masked_fill(outlier, 0.0)
    absmax = inner.abs().amax(dim=1)
    codes = int8_codes(inner.masked_fill(columns, 0.0), absmax)
    return codes.view(A.shape), absmax, columns.nonzero().view(-1)


def int8_vectorwise_dequant(A: Tensor, stats: Tensor) -> Tensor:
    """int8 codes `[rows, K]` and row absmax `[rows]` -> fp32."""
    return _ops.dequantize_int8(A, stats.float().reshape(A.shape[:-1]), torch.float32)


def int8_double_quant(
    A: Tensor,
    col_stats: Tensor | None = None,
    row_stats: Tensor | None = None,
    out_col: Tensor | None = None,
    out_row: Tensor | None = None,
    threshold: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """Row-wise and column-wise int8 codes of `A [M, K]`.

    Returns row codes and column codes int8 `[M, K]`, row absmax fp32 `[M]`, column absmax fp32 `[K]`, outlier columns.
    ValueError where a preallocated result is passed: bitsandbytes has never filled one here.
    """
    for name, value in (("col_stats", col_stats), ("row_stats", row_stats), ("out_col", out_col), ("out_row", out_row)):
        if value is not None:
            raise ValueError(f"{name} must be None: int8_double_quant allocates its results")
    row_codes, rows, outliers = int8_vectorwise_quant(A, threshold)
    kept = A if outliers is None else A.masked_fill(A.abs() >= threshold, 0.0)
    column_codes, columns = _ops.quantize_int8(kept.t())
    return row_codes, column_codes.t().contiguous(), rows, columns, outliers


def int8_linear_matmul(A: Tensor, B: Tensor, out: Tensor | None = None, dtype: torch.dtype = torch.int32) -> Tensor:
    """Exact int32 `A [..., K] @ B [N, K]^T` of int8 codes."""
    if A.dtype != torch.int8 or B.dtype != torch.int8:
        raise ValueError(f"int8_linear_matmul takes int8 codes, got {A.dtype} and {B.dtype}")
    rows = A.reshape(-1, A.shape[-1]).contiguous()
    result = int8_product(rows, B.contiguous()).to(dtype).view(*A.shape[:-1], B.shape[0])
    return result if out is None else out.copy_(result)


def int8_mm_dequant(
    A: Tensor, row_stats: Tensor, col_stats: Tensor, out: Tensor | None = None, bias: Tensor | None = None
) -> Tensor:
    """An int32 product `[..., N]` times `row_stats * col_stats / 127^2`, plus bias, in fp16.

    row_stats: absmax of the left operand's rows. col_stats: absmax of the weight's rows `[N]`.
    """
    if A.dtype != torch.int32:
        raise ValueError(f"int8_mm_dequant takes an int32 product, got {A.dtype}")
    result = A.reshape(-1, A.shape[-1]).float()
    result *= row_stats.float().reshape(-1, 1) * _INVERSE
    result *= col_stats.float().reshape(1, -1) * _INVERSE
    if bias is not None:
        result += bias
    result = result.to(torch.float16).view(A.shape)
    return result if out is None else out.copy_(result)
