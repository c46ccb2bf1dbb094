"""`QuantizedTensor`: the codes and scales of one tensor, with its shape, dtype and format. Data only."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kbit.formats import blocks
from kbit.formats.double import dequantize_absmax
from kbit.formats.spec import Format


@dataclasses.dataclass(frozen=True, eq=False)
class QuantizedTensor:
    """One quantized tensor.

    codes: uint8 (4-bit: packed pairs) or int8, in the row or flat layout of `formats.packing.layout_shapes`.
    absmax: block scales, fp32; uint8 codes of them when double-quantized.
    shape, dtype: of the tensor that was quantized, and of what `dequantize()` returns.
    format: how codes and scales are to be read.
    nested_absmax, nested_offset: fp32 `[ceil(blocks / 256)]` and `[1]`; None unless double-quantized.
    """

    codes: Tensor
    absmax: Tensor
    shape: torch.Size
    dtype: torch.dtype
    format: Format
    nested_absmax: Tensor | None = None
    nested_offset: Tensor | None = None

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The tensor that the codes stand for, in its shape, and in its dtype unless another is asked for."""
        return _dequantize(self, dtype or self.dtype)

    def tensors(self) -> dict[str, Tensor]:
        """Every stored tensor by name; absent ones left out."""
        parts = {
            "codes": self.codes,
            "absmax": self.absmax,
            "nested_absmax": self.nested_absmax,
            "nested_offset": self.nested_offset,
        }
        return {name: tensor for name, tensor in parts.items() if tensor is not None}

    @property
    def nbytes(self) -> int:
        """Stored bytes, scales included."""
        return sum(tensor.nbytes for tensor in self.tensors().values())

    @property
    def device(self) -> torch.device:
        return self.codes.device

    def to(self, device: torch.device | str) -> QuantizedTensor:
        """The same bytes on another device. It moves; it never changes a dtype."""
        moved: dict[str, Any] = {name: tensor.to(device=device) for name, tensor in self.tensors().items()}
        return dataclasses.replace(self, **moved)


def dequantize_reference(q: QuantizedTensor, dtype: torch.dtype) -> Tensor:
    """Decode in plain torch: the oracle of the dispatched operators."""
    if q.format.name == "int8":
        return blocks.dequantize_int8(q.codes, q.absmax, dtype)
    absmax = q.absmax
    if q.nested_absmax is not None and q.nested_offset is not None:
        absmax = dequantize_absmax(q.absmax, q.nested_absmax, q.nested_offset)
    if q.format.is_4bit:
        return blocks.dequantize_4bit(q.codes, absmax, q.format.name, q.format.block_size, q.shape, dtype)
    signed = q.format.name == "dynamic8"
    return blocks.dequantize_dynamic(q.codes, absmax, signed, q.format.block_size, dtype)


_dequantize: Callable[[QuantizedTensor, torch.dtype], Tensor] = dequantize_reference


def set_dequantizer(function: Callable[[QuantizedTensor, torch.dtype], Tensor]) -> None:
    """Let `kbit.ops` route `dequantize()` to the kernels of the device: formats may not import ops."""
    global _dequantize
    _dequantize = function
