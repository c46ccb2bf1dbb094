"""Two 4-bit codes a byte, the even element in the high nibble; and the row and flat layouts of the packed bytes."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from kbit.formats.spec import Format


def pack_nibbles(codes: Tensor, pad_code: int) -> Tensor:
    """uint8 codes below 16 `[n]` -> packed uint8 `[(n + 1) // 2]`; an odd count is filled up with `pad_code`."""
    if codes.numel() % 2:
        codes = torch.cat([codes, codes.new_full((1,), pad_code)])
    pairs = codes.view(-1, 2)
    return (pairs[:, 0] << 4) | pairs[:, 1]


def unpack_nibbles(packed: Tensor, count: int) -> Tensor:
    """Packed uint8 -> codes uint8 `[count]`, the first `count` nibbles in flat order."""
    packed = packed.reshape(-1)
    return torch.stack([packed >> 4, packed & 15], dim=1).view(-1)[:count]


def layout_shapes(fmt: Format, shape: Sequence[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The shapes in which the codes and the block scales of a tensor of `shape` are stored.

    Row layout: codes `[..., K/2]` (8-bit: `[..., K]`) and scales `[..., K/block_size]`. Where a block would cross a
    row, 4-bit codes and all scales keep the flat layout: `[(n + 1) // 2]` and `[blocks]`. The bytes are the same.
    int8: codes `[..., K]` and one scale a row, `[...]`.
    """
    shape = tuple(shape)
    if fmt.name == "int8":
        return shape, shape[:-1]
    rows = fmt.has_row_layout(shape)
    scales = (*shape[:-1], shape[-1] // fmt.block_size) if rows else (fmt.block_count(shape),)
    if not fmt.is_4bit:
        return shape, scales
    return ((*shape[:-1], shape[-1] // 2) if rows else ((math.prod(shape) + 1) // 2,)), scales
