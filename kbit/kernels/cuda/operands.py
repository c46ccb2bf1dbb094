"""What the launchers of Hopper products share: matrices as the copy engine is told of them, 4-bit tables as macros."""

from __future__ import annotations

import ctypes
import functools
from typing import Any

import torch
from torch import Tensor

from kbit.formats.codebooks import codebook
from kbit.kernels.cuda import compile as compiler

UINT8, _FLOAT16, _BFLOAT16 = 0, 6, 9  # CUtensorMapDataType
SWIZZLE = {32: 1, 64: 2, 128: 3}  # CUtensorMapSwizzle by bytes a row


class TensorMap(ctypes.Structure):
    _fields_ = [("words", ctypes.c_uint64 * 16)]


def encode(address: int, kind: int, columns: int, rows: int, row_bytes: int, box: tuple[int, int], swizzle: int) -> Any:
    """A CUtensorMap of a row-major matrix; columns and box in elements. Beyond its edges it reads 0."""
    raw = ctypes.create_string_buffer(128 + 64)  # it has to start on a 64-byte boundary
    tensor_map = TensorMap.from_buffer(raw, -ctypes.addressof(raw) % 64)
    status = compiler.driver().cuTensorMapEncodeTiled(
        ctypes.byref(tensor_map),
        kind,
        2,
        ctypes.c_void_p(address),
        (ctypes.c_uint64 * 2)(columns, rows),
        (ctypes.c_uint64 * 1)(row_bytes),
        (ctypes.c_uint32 * 2)(*box),
        (ctypes.c_uint32 * 2)(1, 1),
        0,
        swizzle,
        2,  # L2 promotion: 128 bytes
        0,
    )
    compiler.check(status, "describing a matrix to the copy engine")
    return tensor_map


# A map depends on address and shape alone, so it stays right whatever tensor lives there.
encode_cached = functools.lru_cache(maxsize=8192)(encode)


def half_kind(dtype: torch.dtype) -> int:
    """The CUtensorMapDataType of fp16 or bf16."""
    return _FLOAT16 if dtype == torch.float16 else _BFLOAT16


def as_rows(x: Tensor, k: int) -> tuple[Tensor, int]:
    """(`x [..., K]` as a matrix that the copy engine reads, elements from one of its rows to the next)."""
    rows = x if x.dim() == 2 else x.reshape(-1, k)
    stride, step = rows.stride()
    if rows.shape[0] == 1:
        stride = k
    if step != 1 or stride % 8 or stride < k:
        return rows.contiguous(), k
    return rows, stride


def table_macros(name: str, dtype: torch.dtype, nested: bool) -> dict[str, object]:
    """CODEBOOK in the bits of a 16-bit dtype; of double-quantized weights also the map of their scales."""
    bits = codebook(name).to(dtype).view(torch.int16).tolist()
    macros: dict[str, object] = {"NESTED": int(nested), "CODEBOOK": ",".join(str(b & 0xFFFF) for b in bits)}
    if nested:
        macros["DYNAMIC_MAP"] = ",".join(f"{float(v).hex()}f" for v in codebook("dynamic8"))
    return macros
