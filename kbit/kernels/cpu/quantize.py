"""Launchers of quantize.cpp: codes, scales and decoded values equal `kbit.formats.blocks` to the bit.

Where a launcher returns None the values are not finite, and the caller's plain torch path says what comes of that.
"""

from __future__ import annotations

import ctypes
import functools
import math

import torch
from torch import Tensor

from kbit.formats.codebooks import PAD_CODE, codebook
from kbit.formats.spec import NESTED_BLOCK_SIZE
from kbit.kernels.cpu import library
from kbit.kernels.cpu.dynamic import Map, dynamic_map
from kbit.kernels.cpu.library import DTYPES

_P, _I32, _I64 = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64
_MAP = ctypes.POINTER(Map)


@functools.cache
def _four_bit(name: str) -> tuple[Tensor, Tensor]:
    return codebook(name, kind="midpoints").contiguous(), codebook(name, kind="sorted_codes").contiguous()


def quantize_4bit(x: Tensor, name: str, block_size: int) -> tuple[Tensor, Tensor]:
    """x (any shape; fp32, bf16, fp16) -> packed codes uint8 and absmax fp32; see `blocks.quantize_4bit`."""
    x = x.detach().contiguous()
    count = x.numel()
    packed = torch.empty((count + 1) // 2, dtype=torch.uint8)
    absmax = torch.empty(-(-count // block_size), dtype=torch.float32)
    midpoints, codes = _four_bit(name)
    call = library.function("kbit_quantize_4bit", (_P, _I32, _I64, _I64, _P, _P, _I32, _P, _P, _I32))
    call(
        *(x.data_ptr(), DTYPES[x.dtype], count, block_size, midpoints.data_ptr(), codes.data_ptr(), PAD_CODE[name]),
        *(packed.data_ptr(), absmax.data_ptr(), torch.get_num_threads()),
    )
    return packed, absmax


def quantize_dynamic(x: Tensor, signed: bool, block_size: int) -> tuple[Tensor, Tensor] | None:
    """x -> codes uint8 of x's shape and absmax fp32; see `blocks.quantize_dynamic`. None where x is not finite."""
    x = x.detach().contiguous()
    codes = torch.empty(x.shape, dtype=torch.uint8)
    absmax = torch.empty(-(-x.numel() // block_size), dtype=torch.float32)
    call = library.function("kbit_quantize_dynamic", (_P, _I32, _I64, _I64, _MAP, _P, _P, _I32), _I32)
    bad = call(
        *(x.data_ptr(), DTYPES[x.dtype], x.numel(), block_size, dynamic_map(signed)),
        *(codes.data_ptr(), absmax.data_ptr(), torch.get_num_threads()),
    )
    return None if bad else (codes, absmax)


def dequantize_dynamic(
    codes: Tensor, absmax: Tensor, signed: bool, block_size: int, dtype: torch.dtype, offset: Tensor | None = None
) -> Tensor:
    """Decode dynamic 8-bit codes; `offset` fp32 `[1]` is added (double quantization). absmax: fp32 or its bits."""
    codes, absmax = codes.contiguous(), absmax.contiguous()
    if absmax.numel() != -(-codes.numel() // block_size):
        raise ValueError(f"{codes.numel()} codes in blocks of {block_size} do not have {absmax.numel()} scales")
    out = torch.empty(codes.shape, dtype=dtype)
    call = library.function("kbit_dequantize_dynamic", (_P, _P, _I64, _I64, _MAP, _P, _P, _I32, _I32))
    call(
        *(codes.data_ptr(), absmax.data_ptr(), codes.numel(), block_size, dynamic_map(signed)),
        None if offset is None else offset.data_ptr(),
        *(out.data_ptr(), DTYPES[dtype], torch.get_num_threads()),
    )
    return out


def dequantize_absmax(codes: Tensor, nested_absmax: Tensor, nested_offset: Tensor) -> Tensor:
    """fp32 scales of double quantization; see `double.dequantize_absmax`."""
    return dequantize_dynamic(codes, nested_absmax, True, NESTED_BLOCK_SIZE, torch.float32, nested_offset)


def quantize_int8(x: Tensor) -> tuple[Tensor, Tensor] | None:
    """x `[..., K]` -> int8 codes and absmax fp32 `[...]`; see `blocks.quantize_int8`. None where x is not finite."""
    x = x.detach().contiguous()
    rows, k = math.prod(x.shape[:-1]), x.shape[-1]
    codes = torch.empty(x.shape, dtype=torch.int8)
    absmax = torch.empty(x.shape[:-1], dtype=torch.float32)
    call = library.function("kbit_quantize_int8", (_P, _I32, _I64, _I64, _P, _P, _I32), _I32)
    bad = call(*(x.data_ptr(), DTYPES[x.dtype], rows, k, codes.data_ptr(), absmax.data_ptr()), torch.get_num_threads())
    return None if bad else (codes, absmax)


def dequantize_int8(codes: Tensor, absmax: Tensor, dtype: torch.dtype) -> Tensor:
    """Decode int8 `[..., K]` with scales `[...]` (fp32 or its bits); see `blocks.dequantize_int8`."""
    codes, absmax = codes.contiguous(), absmax.contiguous()
    rows, k = math.prod(codes.shape[:-1]), codes.shape[-1]
    if absmax.numel() != rows:
        raise ValueError(f"int8 codes {list(codes.shape)} need {rows} scales, got {absmax.numel()}")
    out = torch.empty(codes.shape, dtype=dtype)
    call = library.function("kbit_dequantize_int8", (_P, _P, _I64, _I64, _P, _I32, _I32))
    call(*(codes.data_ptr(), absmax.data_ptr(), rows, k, out.data_ptr(), DTYPES[dtype]), torch.get_num_threads())
    return out
