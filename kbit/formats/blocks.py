"""Block quantization in plain torch: short, exact, on any device. Every kernel is tested against this file.

A tensor is flattened in row-major order and cut into blocks of `block_size`; the last block may be short. A block
stores its largest magnitude (absmax, fp32) and, for every element, the code of a value near `element / absmax`.
Arithmetic is fp32 whatever the input's dtype, each step rounded once, so that every device can give the same bits.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from kbit.formats.codebooks import PAD_CODE, codebook
from kbit.formats.packing import pack_nibbles

# Below this an absmax is treated as this: 1 / absmax stays finite and an all-zero block gives zeros, never NaN.
TINY_ABSMAX = 1e-38
# Elements handled at once: a multiple of every block size.
_CHUNK = 2**18


def block_absmax(flat: Tensor, block_size: int) -> Tensor:
    """fp32 `[ceil(n / block_size)]` largest magnitudes of a flat fp32 tensor `[n]`."""
    full = flat.numel() // block_size * block_size
    absmax = flat[:full].view(-1, block_size).abs().amax(dim=1) if full else flat.new_empty(0)
    if full < flat.numel():
        absmax = torch.cat([absmax, flat[full:].abs().amax().view(1)])
    return absmax


def per_element(scales: Tensor, block_size: int, count: int) -> Tensor:
    """Repeat block scales `[B]` for their elements: `[count]`."""
    return scales.repeat_interleave(block_size)[:count]


def quantize_4bit(x: Tensor, name: str, block_size: int) -> tuple[Tensor, Tensor]:
    """Quantize to NF4 or FP4.

    x: any shape, any floating dtype. name: "nf4" or "fp4".
    Returns packed codes uint8 `[(n + 1) // 2]` and absmax fp32 `[ceil(n / block_size)]`. The bytes equal those of
    bitsandbytes 0.50.2 on an x86 CPU: full blocks multiply by the reciprocal of absmax, a short last block divides,
    and a code is the number of midpoints strictly below the scaled value, so ties go to the lower value.
    """
    flat = x.detach().reshape(-1)
    count = flat.numel()
    packed = torch.empty((count + 1) // 2, dtype=torch.uint8, device=x.device)
    absmax = torch.empty(-(-count // block_size), dtype=torch.float32, device=x.device)
    midpoints, codes_of_rank = codebook(name, kind="midpoints").tolist(), codebook(name, x.device, "sorted_codes")
    for begin, end in _chunks(count):
        values = flat[begin:end].float()
        scales = block_absmax(values, block_size)
        floor = scales.clamp(min=TINY_ABSMAX)
        full = values.numel() // block_size * block_size
        scaled = (values[:full].view(-1, block_size) * (1.0 / floor[: full // block_size, None])).view(-1)
        if full < values.numel():
            scales[-1] = floor[-1]  # a short last block stores the guarded value; a full one stores the true one
            scaled = torch.cat([scaled, values[full:] / floor[-1]])
        rank = torch.zeros(scaled.shape, dtype=torch.uint8, device=x.device)
        for midpoint in midpoints:  # fifteen vector comparisons, four times faster than a binary search an element
            rank += scaled > midpoint
        codes = rank if name == "nf4" else codes_of_rank.index_select(0, rank.int())
        packed[begin // 2 : (end + 1) // 2] = pack_nibbles(codes, PAD_CODE[name])
        absmax[begin // block_size : -(-end // block_size)] = scales
    return packed, absmax


def dequantize_4bit(
    packed: Tensor, absmax: Tensor, name: str, block_size: int, shape: Sequence[int], dtype: torch.dtype
) -> Tensor:
    """Decode NF4 or FP4: value of the code times absmax in fp32, then one cast to `dtype`.

    packed: uint8, `(n + 1) // 2` bytes in flat order (any shape). absmax: fp32, one a block (any shape).
    Raises ValueError where their sizes do not belong to `shape`.
    """
    count = math.prod(shape)
    packed, absmax = packed.reshape(-1), absmax.reshape(-1)
    if packed.numel() != (count + 1) // 2 or absmax.numel() != -(-count // block_size):
        raise ValueError(
            f"{packed.numel()} packed bytes and {absmax.numel()} scales are not a {name} tensor of shape "
            f"{list(shape)} in blocks of {block_size}"
        )
    out = torch.empty(count, dtype=dtype, device=packed.device)
    # One look-up a byte: both fp32 values of a byte as one 64-bit element (gathering rows of two is four times slower).
    pairs = codebook(name, packed.device, "pairs").view(torch.int64).view(-1)
    for begin, end in _chunks(count):
        byte = packed[begin // 2 : (end + 1) // 2].int()
        values = pairs.index_select(0, byte).view(torch.float32)[: end - begin]
        out[begin:end] = scale_blocks(values, absmax[begin // block_size : -(-end // block_size)], block_size)
    return out.view(tuple(shape))


def _chunks(count: int) -> Iterator[tuple[int, int]]:
    """Cut `count` elements into ranges whose fp32 temporaries stay small (bounded memory) and in cache (speed)."""
    return ((begin, min(begin + _CHUNK, count)) for begin in range(0, count, _CHUNK))


def scale_blocks(values: Tensor, absmax: Tensor, block_size: int) -> Tensor:
    """fp32 values `[n]` times the absmax of their block, in place where `values` allows it."""
    count = values.numel()
    absmax = absmax.reshape(-1)
    full = count // block_size * block_size
    if full:
        values[:full].view(-1, block_size).mul_(absmax[: full // block_size, None])
    if full < count:
        values[full:].mul_(absmax[-1])
    return values


def quantize_dynamic(x: Tensor, signed: bool, block_size: int) -> tuple[Tensor, Tensor]:
    """Quantize to the dynamic 8-bit map (optimizer states, block scales).

    x: any shape, any floating dtype. Returns codes uint8 shaped like x and absmax fp32 `[ceil(n / block_size)]`.
    A code is the one whose decoded value is nearest to the element (the two distances in fp32; the lower code on a
    tie). bitsandbytes' CPU quantizer is not nearest, so codes may differ from its; ours are never further off.
    """
    flat = x.detach().reshape(-1)
    name = "dynamic8" if signed else "dynamic8-unsigned"
    codes = torch.empty(flat.numel(), dtype=torch.uint8, device=x.device)
    absmax = torch.empty(-(-flat.numel() // block_size), dtype=torch.float32, device=x.device)
    for begin, end in _chunks(flat.numel()):
        values = flat[begin:end].float()
        scales = block_absmax(values, block_size)
        codes[begin:end] = _nearest_dynamic(values, per_element(scales, block_size, values.numel()), name)
        absmax[begin // block_size : -(-end // block_size)] = scales
    return codes.view(x.shape), absmax


def _nearest_dynamic(values: Tensor, scale: Tensor, name: str) -> Tensor:
    """int32 codes whose decoded values lie nearest to fp32 `values` under the scale of each element."""
    table = codebook(name, values.device)
    scaled = torch.where(scale > 0, values / scale, torch.zeros_like(values))
    rank = torch.bucketize(scaled, codebook(name, values.device, "midpoints"), out_int32=True)
    # The division rounds, so the true nearest may be a neighbour: settle it on decoded values.
    lower, upper = (rank - 1).clamp_(min=0), (rank + 1).clamp_(max=255)
    distance = (values - table[rank] * scale).abs()
    best = torch.where((values - table[lower] * scale).abs() <= distance, lower, rank)
    best = torch.where((values - table[upper] * scale).abs() < distance, upper, best)
    return torch.where(scale > 0, best, codebook(name, values.device, "zero_code"))


def dequantize_dynamic(codes: Tensor, absmax: Tensor, signed: bool, block_size: int, dtype: torch.dtype) -> Tensor:
    """Decode dynamic 8-bit codes (any shape): map value times the block's absmax in fp32, then one cast."""
    table = codebook("dynamic8" if signed else "dynamic8-unsigned", codes.device)
    values = table.index_select(0, codes.reshape(-1).int())
    return scale_blocks(values, absmax, block_size).to(dtype).view(codes.shape)


def quantize_int8(x: Tensor) -> tuple[Tensor, Tensor]:
    """Row-wise symmetric int8, as in "LLM.int8()" (Dettmers et al. 2022, arXiv 2208.07339).

    x: `[..., K]`, any floating dtype. Returns codes int8 shaped like x, `round_half_even(x * (127 / absmax))`, and
    absmax fp32 `[...]`. A zero row gives zeros.
    """
    x = x.detach()
    columns = x.shape[-1]
    rows = x.reshape(math.prod(x.shape[:-1]), columns)
    codes = torch.empty(rows.shape, dtype=torch.int8, device=x.device)  # row-major, however x lies in memory
    absmax = torch.zeros(rows.shape[0], dtype=torch.float32, device=x.device)
    step = max(1, _CHUNK // max(columns, 1))
    for begin in range(0, rows.shape[0] if columns else 0, step):
        values = rows[begin : begin + step].float()
        absmax[begin : begin + step] = values.abs().amax(dim=1)
        codes[begin : begin + step] = int8_codes(values, absmax[begin : begin + step])
    return codes.view(x.shape), absmax.view(x.shape[:-1])


def int8_codes(values: Tensor, absmax: Tensor) -> Tensor:
    """int8 codes of fp32 `values [..., K]` under row scales `absmax [...]`; elements beyond absmax saturate."""
    row = absmax.unsqueeze(-1)
    # 127 / absmax overflows for absmax below 3.7e-37; a power of two scales such a row without rounding it.
    boost = torch.where(row < 2.0**-100, 2.0**64, 1.0)
    inverse = torch.where(row > 0, 127.0 / (row * boost), 0.0)
    return (values * boost).mul_(inverse).round_().clamp_(-127, 127).to(torch.int8)


def dequantize_int8(codes: Tensor, absmax: Tensor, dtype: torch.dtype) -> Tensor:
    """Decode row-wise int8: `(code * absmax) * fp32(1 / 127)` in fp32, then one cast."""
    return (codes.float().mul_(absmax.unsqueeze(-1)).mul_(1.0 / 127.0)).to(dtype)
