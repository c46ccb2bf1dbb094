"""Double quantization: the block scales of a 4-bit tensor, themselves in 8 bits ("QLoRA", arXiv 2305.14314).

`absmax - mean(absmax)` is stored in the signed dynamic map in blocks of 256: one byte a scale, one fp32 value for 256
scales, and the mean. At block size 64 that is 0.127 bits a weight in place of 0.5.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kbit.formats.blocks import dequantize_dynamic, quantize_dynamic
from kbit.formats.spec import NESTED_BLOCK_SIZE


def quantize_absmax(absmax: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """fp32 scales `[B]` -> codes uint8 `[B]`, nested absmax fp32 `[ceil(B / 256)]`, offset fp32 `[1]`.

    The offset is torch's fp32 mean (0 for an empty tensor), whose last bits depend on torch's thread count from
    65,536 scales up.
    """
    absmax = absmax.reshape(-1)
    offset = mean(absmax)
    codes, nested_absmax = quantize_dynamic(absmax - offset, signed=True, block_size=NESTED_BLOCK_SIZE)
    return codes, nested_absmax, offset


def mean(absmax: Tensor) -> Tensor:
    """The offset of fp32 scales `[B]`, fp32 `[1]`."""
    count = absmax.numel()
    if not count:
        return absmax.new_zeros(1)
    mean = absmax.mean()
    # The sum of scales near fp32's largest value overflows; their mean does not.
    return torch.where(mean.isinf(), (absmax / count).sum(), mean).view(1)


def dequantize_absmax(codes: Tensor, nested_absmax: Tensor, offset: Tensor) -> Tensor:
    """fp32 scales shaped like `codes`: map value times nested absmax, rounded, plus the offset, rounded (no FMA)."""
    return dequantize_dynamic(codes, nested_absmax, True, NESTED_BLOCK_SIZE, torch.float32).add_(offset)
