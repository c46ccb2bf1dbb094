"""Quantize a weight on the CPU a few rows at a time: the same bits, with temporaries of a megabyte or two.

Loading may hold one floating point weight beside the model. Quantizing it whole would add its transposed copy (Conv1D)
and several fp32 temporaries.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kbit.formats.packing import layout_shapes
from kbit.formats.spec import Format
from kbit.formats.tensor import QuantizedTensor
from kbit.nn.base import quantize_weight, to_parts
from kbit.ops import quantize
from kbit.ops.quantize import check_quantizable

PIECE = 2**16  # elements


def rows_at_a_time(fmt: Format, columns: int) -> int:
    """How many rows of `columns` elements make a piece that ends where a block and a byte end."""
    unit = 1
    if fmt.is_4bit:
        unit = fmt.block_size // math.gcd(columns, fmt.block_size)
        unit *= 1 + unit * columns % 2
    return max(1, PIECE // (unit * max(columns, 1))) * unit


def quantize_in_pieces(weight: Tensor, fmt: Format, name: str) -> dict[str, Tensor]:
    """The parts that `kbit.nn.base.quantize_weight` gives for `weight [N, K]` of any strides, or experts `[E, N, K]`.

    Raises ValueError that calls the tensor `name` for NaN and infinity.
    """
    shape = weight.shape
    weight = weight.reshape(-1, shape[-1])
    rows, columns = weight.shape
    step = rows_at_a_time(fmt, columns)
    if weight.device.type != "cpu" or rows <= step:
        return quantize_weight(weight.view(shape), fmt, name)
    plain = Format(fmt.name, fmt.block_size)
    count, blocks = weight.numel(), plain.block_count(weight.shape)
    codes = torch.empty((count + 1) // 2 if fmt.is_4bit else count, dtype=torch.uint8 if fmt.is_4bit else torch.int8)
    absmax = torch.empty(blocks, dtype=torch.float32)
    code_start = block_start = 0
    for begin in range(0, rows, step):
        try:
            part = quantize(weight[begin : begin + step].contiguous(), plain, name=name)
        except ValueError:
            check_quantizable(weight, f"tensor {name!r}")  # the same error, with the position in the whole weight
            raise
        codes[code_start : code_start + part.codes.numel()] = part.codes.reshape(-1)
        absmax[block_start : block_start + part.absmax.numel()] = part.absmax.reshape(-1)
        code_start += part.codes.numel()
        block_start += part.absmax.numel()
    nested_absmax = nested_offset = None
    scales = absmax
    if fmt.double_quant:
        scales, nested_absmax, nested_offset = torch.ops.kbit.quantize_absmax(absmax)
    codes_shape, scales_shape = layout_shapes(fmt, shape)
    return to_parts(
        QuantizedTensor(
            codes.view(codes_shape),
            scales.view(scales_shape),
            shape,
            weight.dtype,
            fmt,
            nested_absmax,
            nested_offset,
        )
    )
