"""`kbit.quantize` and `QuantizedTensor.dequantize`: a tensor in, its codes and scales out, and back."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kbit.formats.packing import layout_shapes
from kbit.formats.spec import Format
from kbit.formats.tensor import QuantizedTensor, set_dequantizer

_ops = torch.ops.kbit
_FLOAT_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


@torch.inference_mode(False)  # codes made in inference mode must still serve training
def quantize(
    tensor: Tensor,
    format: str | Format = "nf4",
    block_size: int | None = None,
    double_quant: bool | None = None,
    name: str | None = None,
) -> QuantizedTensor:
    """Quantize a tensor.

    tensor: any shape, fp32, fp16, bf16 or fp64, contiguous or not, empty too.
    format: a Format, or a name: "nf4", "fp4" (double-quantized unless `double_quant=False`), "nf4-plain",
        "fp4-plain", "int8" (one scale a row of the last dimension), "dynamic8", "dynamic8-unsigned".
    block_size: elements a scale (default 64 for 4 bits, 256 for dynamic 8-bit; int8 has none).
    name: what errors call the tensor.

    Returns a QuantizedTensor on the tensor's device. Raises ValueError for NaN or infinity, for a format that does
    not exist, and for a negative value in dynamic8-unsigned; TypeError for a dtype that is not floating point.
    """
    if isinstance(format, str):
        format = Format.parse(format, block_size, double_quant)
    elif block_size is not None or double_quant is not None:
        raise ValueError("block_size and double_quant belong to the Format; pass them there")
    label = f"tensor {name!r}" if name else "tensor"
    check_quantizable(tensor, label)
    if format.name == "int8" and tensor.dim() == 0:
        raise ValueError(f"{label} is a scalar; int8 needs at least one dimension, whose last one is the row")
    tensor = tensor.detach()
    if format.name == "dynamic8-unsigned" and tensor.numel() and tensor.min() < 0:
        raise ValueError(f"{label} holds negative values, which dynamic8-unsigned cannot store; use dynamic8")

    codes_shape, scales_shape = layout_shapes(format, tensor.shape)
    nested_absmax = nested_offset = None
    if format.name == "int8":
        codes, absmax = _ops.quantize_int8(tensor)
    elif format.is_4bit:
        codes, absmax = _ops.quantize_4bit(tensor, format.name, format.block_size)
        if format.double_quant:
            absmax, nested_absmax, nested_offset = _ops.quantize_absmax(absmax)
    else:
        codes, absmax = _ops.quantize_dynamic(tensor, format.name == "dynamic8", format.block_size)
    return QuantizedTensor(
        codes.view(codes_shape),
        absmax.view(scales_shape),
        tensor.shape,
        tensor.dtype,
        format,
        nested_absmax,
        nested_offset,
    )


def check_quantizable(tensor: Tensor, label: str) -> None:
    """Raise what `quantize` raises for a tensor of another dtype, without values, or with values that are not finite.

    Finite means finite in fp32, in which all formats compute. The error says how many there are and where the first is.
    """
    if tensor.dtype not in _FLOAT_DTYPES:
        raise TypeError(f"{label} has dtype {tensor.dtype}; only fp32, fp16, bf16 and fp64 can be quantized")
    if tensor.is_meta:
        raise ValueError(f"{label} is on the meta device and holds no values to quantize: load the weights first")
    tensor = tensor.detach()
    # One reduction first: the extremes of a tensor are finite exactly when every element is.
    if not tensor.numel() or torch.stack(torch.aminmax(tensor)).float().isfinite().all():
        return
    bad = tensor.float().isfinite().logical_not()
    first = tuple(int(i) for i in bad.nonzero()[0])
    value = float(tensor[first])
    kind = "NaN" if math.isnan(value) else "infinity" if math.isinf(value) else f"{value:g}, infinity in fp32,"
    raise ValueError(
        f"{label} holds {int(bad.sum())} values that are not finite (first: {kind} at {list(first)}); it cannot be "
        "quantized. Check the checkpoint, or skip this module with skip_modules."
    )


def dequantize(q: QuantizedTensor, dtype: torch.dtype | None = None) -> Tensor:
    """The tensor that `q` stands for, in `q.shape`, in `dtype` or the dtype that was quantized."""
    dtype = dtype or q.dtype
    fmt = q.format
    if fmt.name == "int8":
        return _ops.dequantize_int8(q.codes, q.absmax, dtype)
    if fmt.is_4bit:
        return _ops.dequantize_4bit(
            q.codes, q.absmax, q.nested_absmax, q.nested_offset, fmt.name, fmt.block_size, list(q.shape), dtype
        )
    return _ops.dequantize_dynamic(q.codes, q.absmax, fmt.name == "dynamic8", fmt.block_size, dtype)


set_dequantizer(dequantize)
