"""NF4 and FP4 quantization, to the bit as `kbit.formats.blocks.quantize_4bit`.

The code of a value is the number of midpoints strictly below it. Cutting [-1, 1] into intervals (lo, hi] of width 1/16
leaves at most one midpoint inside each, so a code costs two look-ups and one comparison instead of fifteen: the table
holds, for every interval, its midpoint and the codes on both sides. Scaling by 16 is exact, so is the interval.
"""

from __future__ import annotations

import functools
import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from kbit.formats.blocks import TINY_ABSMAX
from kbit.formats.codebooks import PAD_CODE, codebook
from kbit.kernels.triton import tiles
from kbit.kernels.triton.common import NO_FMA, on_device

_BINS = 33  # ceil(16 v) + 16 for v in [-1, 1]


@functools.cache
def bins(name: str) -> tuple[Tensor, Tensor]:
    """(midpoint fp32 `[33]`, codes int32 `[33]`: the code up to the midpoint in bits 0-3, above it in bits 4-7)."""
    midpoints = codebook(name, kind="midpoints").tolist()
    codes = codebook(name, kind="sorted_codes").tolist()
    inside, packed = [], []
    for index in range(_BINS):
        low, high = (index - 17) / 16, (index - 16) / 16
        rank = sum(m <= low for m in midpoints)  # each of these is below every value of the interval
        within = [m for m in midpoints if low < m < high]
        if len(within) > 1:
            raise AssertionError(f"{name} has {len(within)} midpoints in ({low}, {high}]")
        inside.append(within[0] if within else math.inf)
        packed.append(codes[rank] | codes[min(rank + 1, 15)] << 4)
    return torch.tensor(inside, dtype=torch.float32), torch.tensor(packed, dtype=torch.int32)


@functools.cache
def _bins_on(name: str, device: torch.device) -> tuple[Tensor, Tensor]:
    inside, packed = bins(name)
    return inside.to(device), packed.to(device)


@triton.jit
def quantize_4bit_kernel(
    x,
    packed,
    absmax,
    midpoints,
    bin_codes,
    count,
    nbytes,
    blocks,
    TINY: tl.constexpr,
    PAD: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    # `nbytes` is (count + 1) // 2: passed, so that Triton sees its divisibility and widens the accesses to the codes.
    # One program: ROWS blocks of BLOCK elements.
    first = tl.program_id(0).to(tl.int64) * ROWS
    row = first + tl.arange(0, ROWS)
    element = row[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    value = tl.load(x + element, mask=element < count, other=0.0).to(tl.float32)
    scale = tl.max(tl.abs(value), axis=1)
    floor = tl.maximum(scale, tl.full((), TINY, tl.float32))  # a bare 1e-38 would count as fp64
    scaled = value * tl.div_rn(1.0, floor)[:, None]
    if (first + ROWS) * BLOCK > count:  # the last program: a short block divides, and stores the guarded scale
        short = (row + 1) * BLOCK > count
        scaled = tl.where(short[:, None], tl.div_rn(value, tl.broadcast_to(floor[:, None], (ROWS, BLOCK))), scaled)
        scale = tl.where(short, floor, scale)
    scaled = tl.minimum(tl.maximum(scaled, -1.0), 1.0)
    # The ceiling by hand: libdevice's flushes subnormals to zero, and the least value above zero has another FP4 code.
    sixteenths = scaled * 16.0
    whole = sixteenths.to(tl.int32)
    index = whole + (sixteenths > whole.to(tl.float32)).to(tl.int32) + 16
    pair = tl.load(bin_codes + index)
    code = tl.where(scaled > tl.load(midpoints + index), pair >> 4, pair & 15)
    code = tl.where(element < count, code, PAD)
    high, low = tl.split(tl.reshape(code, (ROWS, BLOCK // 2, 2)))
    byte = row[:, None] * (BLOCK // 2) + tl.arange(0, BLOCK // 2)[None, :]
    tl.store(packed + byte, (high * 16 + low).to(tl.uint8), mask=byte < nbytes)
    tl.store(absmax + row, scale, mask=row < blocks)


def quantize_4bit(x: Tensor, name: str, block_size: int, tile: tiles.Tile | None = None) -> tuple[Tensor, Tensor]:
    """x: any shape and floating dtype -> packed uint8 `[(n + 1) // 2]`, absmax fp32 `[ceil(n / block_size)]`."""
    x = x.detach()
    x = (x.float() if x.dtype == torch.float64 else x).contiguous()
    count = x.numel()
    blocks = -(-count // block_size)
    packed = torch.empty((count + 1) // 2, dtype=torch.uint8, device=x.device)
    absmax = torch.empty(blocks, dtype=torch.float32, device=x.device)
    if count:
        tile = tile or tiles.choose("quantize_4bit", packed, 1, count, 1)
        rows = max(1, tile.bn // block_size)
        with on_device(x):
            quantize_4bit_kernel[(triton.cdiv(blocks, rows),)](
                x,
                packed,
                absmax,
                *_bins_on(name, x.device),
                count,
                packed.numel(),
                blocks,
                TINY=TINY_ABSMAX,
                PAD=PAD_CODE[name],
                BLOCK=block_size,
                ROWS=rows,
                num_warps=tile.warps,
                **NO_FMA,
            )
    return packed, absmax
