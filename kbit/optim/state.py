"""Containers of optimizer states: fp32, 8-bit blocks, and either of them paged to pinned host memory.

A parameter's states are plain tensors in `optimizer.state[p]`, shaped like the parameter, so that every tool that
saves or moves optimizers can handle them:

    step                      fp32 scalar on the parameter's device
    exp_avg                   fp32, or uint8 codes of the dynamic map
    exp_avg_absmax            fp32 [ceil(n / 256)], only beside codes; [rows, K / 256] for rows of K elements that are
                              whole blocks, so that it shards with the rows
    compensation              the parameter's dtype, only with Kahan compensation

Blocks of 256 run over the parameter's row-major order, whatever its memory layout. First moments use the signed map,
second moments the unsigned one ("8-bit Optimizers via Block-wise Quantization", Dettmers et al. 2021,
arXiv 2110.02861): 1 + 4/256 bytes an element and state, 2.03 bytes a parameter for Adam.

Codes are the nearest, but for one rule: a positive second moment never gets the code of 0. It takes the smallest
positive code instead, since an update divides by its root: beside an element whose gradients are thousands of times
larger it would else be lost, its momentum not, and the next step be thousands of times too large.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kbit.formats.blocks import block_absmax, dequantize_dynamic, per_element, quantize_dynamic
from kbit.formats.codebooks import codebook
from kbit.optim import sharding
from kbit.optim.rules import GRAD_AVG, SQUARE_AVG, StateSpec

BLOCK_SIZE = 256
# Below this many elements a paged optimizer keeps states on the device: the transfer would cost more than it saves.
MIN_PAGED_SIZE = 100_000
# Smaller magnitudes are stored as zero: a block scaled by a subnormal absmax decodes differently on some devices.
SMALLEST = torch.finfo(torch.float32).tiny


def absmax_key(name: str) -> str:
    return f"{name}_absmax"


def codebook_name(signed: bool) -> str:
    return "dynamic8" if signed else "dynamic8-unsigned"


def absmax_shape(shape: Sequence[int]) -> tuple[int, ...]:
    """The shape of the block scales of a parameter."""
    count = math.prod(shape)
    row = math.prod(shape[1:])
    if len(shape) > 1 and shape[0] and row % BLOCK_SIZE == 0:
        return (shape[0], row // BLOCK_SIZE)
    return (-(-count // BLOCK_SIZE),)


def wants_8bit(count: int, config: dict[str, Any]) -> bool:
    """Whether a parameter of `count` elements (its full size, not a shard's) has 8-bit states.

    Never with `centered`: the variance is a small difference of two states, and the rounding of codes takes it to 0.
    """
    return config["optim_bits"] == 8 and count >= config["min_8bit_size"] and not config.get("centered", False)


def wants_paging(p: Tensor, config: dict[str, Any]) -> bool:
    return bool(config["is_paged"]) and p.is_cuda and p.numel() >= MIN_PAGED_SIZE and not sharding.is_sharded(p)


def create(state: dict[str, Any], spec: StateSpec, like: Tensor, bits8: bool, paged: bool, fill: float = 0.0) -> None:
    """Add one state tensor, filled with a value, shaped (and sharded) like `like`."""
    mine = sharding.local(like)
    place: dict[str, Any] = {"pin_memory": True} if paged else {"device": mine.device}
    dtype = torch.uint8 if bits8 else torch.float32
    values = torch.empty(mine.shape, dtype=dtype, **place)
    if not bits8:
        state[spec.name] = sharding.wrap(values.fill_(fill), like, like.shape)
        return
    # A block of equal positive values has absmax that value and the code of 1.0; one of zeros the code of 0.
    code = 255 if fill else int(codebook(codebook_name(spec.signed), "cpu", "zero_code"))
    state[spec.name] = sharding.wrap(values.fill_(code), like, like.shape)
    absmax = torch.full(absmax_shape(mine.shape), fill, dtype=torch.float32, device=mine.device)
    if sharding.is_sharded(like) and len(absmax_shape(like.shape)) == 2:
        whole = absmax_shape(like.shape)
        state[absmax_key(spec.name)] = sharding.wrap(absmax.view(mine.shape[0], whole[1]), like, whole)
    else:
        state[absmax_key(spec.name)] = absmax


def read(state: dict[str, Any], spec: StateSpec, device: torch.device) -> Tensor:
    """The fp32 values of a state (of this rank's part) on `device`, shaped like the parameter; may be the state."""
    stored = sharding.local(state[spec.name]).to(device)
    if stored.dtype != torch.uint8:
        return stored
    absmax = sharding.local(state[absmax_key(spec.name)]).to(device)
    return dequantize_dynamic(stored, absmax, spec.signed, BLOCK_SIZE, torch.float32)


def write(state: dict[str, Any], spec: StateSpec, values: Tensor, again: bool = False) -> None:
    """Store fp32 values, shaped like (this rank's part of) the parameter, in place.

    again: they may have been codes before (`requantize`).
    """
    stored = sharding.local(state[spec.name])
    if stored.dtype != torch.uint8:
        stored.copy_(values)
        return
    values = flush(values)
    codes, absmax = requantize(values, spec.signed) if again else quantize_dynamic(values, spec.signed, BLOCK_SIZE)
    stored.copy_(codes if spec.signed else lift(codes, values > 0))
    kept = sharding.local(state[absmax_key(spec.name)])
    kept.copy_(absmax.view(kept.shape))


def requantize(values: Tensor, signed: bool) -> tuple[Tensor, Tensor]:
    """`quantize_dynamic` of fp32 values that may have been codes: decoded codes give the same values again.

    The signed map ends at 1 and at about -0.993. A block whose largest magnitude was negative decodes to -0.993 of its
    scale, and quantized under that smaller scale its other elements would move. So where the scale that has the
    extreme at -0.993 reproduces the whole block exactly, that scale is the block's.
    """
    # In pieces of whole blocks, since each has several temporaries.
    pieces = [_requantize(piece, signed) for piece in values.reshape(-1).split(BLOCK_SIZE << 13)]
    codes, absmax = (torch.cat(parts) for parts in zip(*pieces, strict=True))
    return codes.view(values.shape), absmax


def _requantize(flat: Tensor, signed: bool) -> tuple[Tensor, Tensor]:
    codes, absmax = quantize_dynamic(flat, signed, BLOCK_SIZE)
    count = flat.numel()
    if not signed or not count:
        return codes, absmax
    extreme = (flat == -per_element(absmax, BLOCK_SIZE, count)) & (flat < 0)
    candidate = block_absmax(extreme.float(), BLOCK_SIZE) > 0
    guess = absmax / -codebook("dynamic8", flat.device)[0]
    for scale in (guess, guess.nextafter(2 * guess), guess.nextafter(0 * guess)):  # the product was rounded
        # With the extreme made positive, the scale is the block's absmax.
        raised = torch.where(extreme, per_element(scale, BLOCK_SIZE, count), flat)
        others, same = quantize_dynamic(raised, True, BLOCK_SIZE)
        others = others.masked_fill(extreme, 0)
        off = dequantize_dynamic(others, same, True, BLOCK_SIZE, torch.float32) != flat
        taken = candidate & (block_absmax(off.float(), BLOCK_SIZE) == 0)
        codes = torch.where(per_element(taken, BLOCK_SIZE, count), others, codes)
        absmax = torch.where(taken, same, absmax)
    return codes, absmax


def are_numbers_of_codes(values: Tensor) -> bool:
    """Whether fp32 values are codes that were copied as numbers, as torch.distributed.checkpoint does without a word.

    Many different whole numbers from 0 to 255 and nothing else: no average of gradients looks like that.
    """
    some = sharding.local(values).reshape(-1)[: 16 * BLOCK_SIZE]
    return _hold_bytes(some) and some.unique().numel() > 16


def are_whole(values: Tensor) -> bool:
    """Whether fp32 values are whole numbers from 0 to 255, and not all 0."""
    part = sharding.local(values)
    return _hold_bytes(part) and bool(part.any())


def _hold_bytes(values: Tensor) -> bool:
    return bool(((values == values.round()) & (values >= 0) & (values <= 255)).all())


def flush(values: Tensor) -> Tensor:
    """Zero instead of subnormal numbers."""
    return values.masked_fill(values.abs() < SMALLEST, 0.0)


def lift(codes: Tensor, positive: Tensor) -> Tensor:
    """Codes of the unsigned map with its smallest positive one, 1, instead of 0 where `positive` (bool) says so."""
    return codes.maximum(positive.to(codes.dtype))


def convert(state: dict[str, Any], spec: StateSpec, like: Tensor, bits8: bool, paged: bool) -> None:
    """Change a state's container where it differs from what is wanted; its values stay, up to 8-bit rounding."""
    stored = state[spec.name]
    if (stored.dtype == torch.uint8) != bits8:
        values = read(state, spec, like.device)
        state.pop(absmax_key(spec.name), None)
        create(state, spec, like, bits8, paged)
        write(state, spec, values, again=True)
        if spec == GRAD_AVG and not bits8:
            # Codes do not tell the variance of a centered RMSprop: at least the mean's square is safe, and fades.
            write(state, SQUARE_AVG, read(state, SQUARE_AVG, values.device).maximum(2 * values.square()))
    elif paged and not (stored.device.type == "cpu" and stored.is_pinned()):
        state[spec.name] = torch.empty(stored.shape, dtype=stored.dtype, pin_memory=True).copy_(stored)
    elif not paged and stored.device != like.device:
        state[spec.name] = stored.to(like.device)
    key = absmax_key(spec.name)
    if key in state and state[key].device != like.device:
        state[key] = state[key].to(like.device)
