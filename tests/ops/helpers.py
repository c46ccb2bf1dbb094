"""Quantized weights as the operators take them, and what they stand for."""

from __future__ import annotations

import torch
from torch import Tensor

import kbit
from kbit.formats import Format
from kbit.formats.tensor import dequantize_reference

FOUR_BIT = ("nf4", "nf4-plain", "fp4", "fp4-plain")


def weight_4bit(
    n: int, k: int, label: str = "nf4", block_size: int = 64, bits: bool = True
) -> tuple[tuple[Tensor, Tensor, Tensor | None, Tensor | None], Tensor]:
    """((weight, absmax, nested_absmax, nested_offset), W [N, K] fp32). bits: fp32 scales as int32, as modules do."""
    q = kbit.quantize(torch.randn(n, k), Format.parse(label, block_size))

    def stored(t: Tensor | None) -> Tensor | None:
        return t.view(torch.int32) if bits and t is not None and t.dtype == torch.float32 else t

    parts = (q.codes, stored(q.absmax), stored(q.nested_absmax), stored(q.nested_offset))
    return parts, dequantize_reference(q, torch.float32)  # type: ignore[return-value]


def weight_8bit(n: int, k: int, bits: bool = True) -> tuple[tuple[Tensor, Tensor], Tensor]:
    q = kbit.quantize(torch.randn(n, k), "int8")
    return (q.codes, q.absmax.view(torch.int32) if bits else q.absmax), dequantize_reference(q, torch.float32)


def close(actual: Tensor, expected: Tensor, dtype: torch.dtype | None = None) -> None:
    """Within the rounding of one product in `dtype`; `expected` is float64."""
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
    limit = tolerance[dtype or actual.dtype] * max(1.0, float(expected.abs().max())) if expected.numel() else 0
    assert actual.shape == expected.shape
    error = (actual.double() - expected.double()).abs()
    assert not error.numel() or float(error.max()) <= limit, f"{float(error.max())} > {limit}"
