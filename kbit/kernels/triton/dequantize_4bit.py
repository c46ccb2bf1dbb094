"""NF4 and FP4 decoding: value of the code times the block scale in fp32, then one cast. Any shape and layout."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from kbit.formats.codebooks import codebook
from kbit.kernels.triton import tiles
from kbit.kernels.triton.common import NO_FMA, load_scale, on_device, scales_of


@triton.jit
def dequantize_4bit_kernel(
    packed,
    absmax,
    nested_absmax,
    offset,
    scale_table,
    values,
    out,
    count,
    nbytes,
    blocks,
    NESTED: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    # `nbytes` is (count + 1) // 2: passed, so that Triton sees its divisibility and widens the accesses to the codes.
    # One program: ROWS blocks of BLOCK elements, in flat order.
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    scale = load_scale(absmax, nested_absmax, offset, scale_table, row, row < blocks, NESTED)
    byte = row[:, None] * (BLOCK // 2) + tl.arange(0, BLOCK // 2)[None, :]
    code = tl.load(packed + byte, mask=byte < nbytes, other=0).to(tl.int32)
    high = tl.load(values + (code >> 4)) * scale[:, None]
    low = tl.load(values + (code & 15)) * scale[:, None]
    both = tl.reshape(tl.join(high, low), (ROWS, BLOCK))
    element = row[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    tl.store(out + element, both.to(out.dtype.element_ty), mask=element < count)


def dequantize_4bit(
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    name: str,
    block_size: int,
    shape: Sequence[int],
    dtype: torch.dtype,
    tile: tiles.Tile | None = None,
) -> Tensor:
    """packed: uint8 bytes in flat order, any shape -> `shape`, in `dtype` (fp32, fp16 or bf16)."""
    out = torch.empty(tuple(shape), dtype=dtype, device=packed.device)
    count = math.prod(shape)
    if count:
        packed = packed.contiguous()
        scales = scales_of(absmax, nested_absmax, nested_offset)
        tile = tile or tiles.choose("dequantize_4bit", packed, 1, count, 1)
        blocks, rows = -(-count // block_size), max(1, tile.bn // block_size)
        with on_device(packed):
            dequantize_4bit_kernel[(triton.cdiv(blocks, rows),)](
                packed,
                scales.absmax,
                scales.nested_absmax,
                scales.offset,
                scales.table,
                codebook(name, packed.device),
                out,
                count,
                (count + 1) // 2,
                blocks,
                NESTED=scales.nested,
                BLOCK=block_size,
                ROWS=rows,
                num_warps=tile.warps,
                **NO_FMA,
            )
    return out
