"""The codebooks that bitsandbytes can construct: dynamic, normal-float, small floats, linear, and the 4-bit tables."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from kbit.formats.codebooks import codebook, dynamic_map

# "NF4 Isn't Information Theoretically Optimal (and that's Good)", arXiv 2306.06965, for blocks of 64.
_AF4 = (
    -1.0, -0.69441008, -0.51243739, -0.3736951, -0.25607552, -0.14982478, -0.04934812, 0.0,
    0.04273164, 0.12934483, 0.21961274, 0.31675666, 0.42563882, 0.55496234, 0.72424863, 1.0,
)  # fmt: skip


def default_device() -> torch.device:
    """Where bitsandbytes puts a table when nobody says where: the GPU, here only if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _padded(values: Tensor) -> Tensor:
    """fp32 `[256]`: sorted values of a map with fewer than 256 entries, filled up with zeros where 0 belongs."""
    zeros = values.new_zeros(256 - values.numel())
    return torch.cat([values, zeros]).sort().values.float()


def create_linear_map(signed: bool = True, total_bits: int = 8, add_zero: bool = True) -> Tensor:
    """Evenly spaced values in [-1, 1] (or [0, 1]) as an fp32 map of 256 entries, zeros in the middle where fewer."""
    count = 2**total_bits
    if signed and (add_zero or total_bits < 8):
        count -= 1  # symmetric around an exact zero
    values = torch.linspace(-1.0 if signed else 0.0, 1.0, count)
    gap = 256 - count
    half = count // 2
    return torch.cat([values[:half], values.new_zeros(gap), values[half:]]) if gap else values


def create_normal_map(offset: float = 0.9677083, use_extra_value: bool = True) -> Tensor:
    """NormalFloat: quantiles of the standard normal distribution, fp32 `[256]` with zeros for the unused entries.

    offset: the outermost quantile. use_extra_value: 8 positive and 7 negative values, else 7 and 7.
    """

    def quantiles(count: int) -> Tensor:
        return torch.special.ndtri(torch.linspace(offset, 0.5, count)[:-1].double())

    positive, negative = quantiles(9 if use_extra_value else 8), -quantiles(8)
    values = _padded(torch.cat([positive, negative]).float())
    return values / values.max()


def create_fp8_map(signed: bool = True, exponent_bits: int = 5, precision_bits: int = 2, total_bits: int = 8) -> Tensor:
    """Every value of a small float (also 4-bit ones), normalized to a largest value of 1: sorted fp32 `[256]`."""
    if exponent_bits + precision_bits != total_bits - int(signed):
        raise ValueError(
            f"{exponent_bits} exponent and {precision_bits} precision bits do not make {total_bits} bits"
            + (" with a sign" if signed else "")
        )
    bias = 2 ** (exponent_bits - 1)
    values: list[float] = []
    for exponent, fraction in itertools.product(range(2**exponent_bits), range(2**precision_bits)):
        mantissa = fraction / 2**precision_bits
        value = mantissa * 2.0**-bias if exponent == 0 else (1 + mantissa) * 2.0 ** (bias + 1 - exponent)
        values += [value, -value] if signed else [value]
    code = _padded(torch.tensor(values, dtype=torch.float32))
    return code / code.max()


def create_dynamic_map(signed: bool = True, max_exponent_bits: int = 7, total_bits: int = 8) -> Tensor:
    """The dynamic map: a unary exponent of up to `max_exponent_bits` decades, the rest of the bits a linear fraction.

    fp32 `[256]`, sorted. "8-bit Approximations for Parallelism in Deep Learning", arXiv 1511.04561.
    """
    if (max_exponent_bits, total_bits) == (7, 8):
        return dynamic_map(signed)
    spare = total_bits - 1 - max_exponent_bits  # fraction bits that even the smallest decade has
    pieces = [torch.tensor([0.0, 1.0])]
    for decade in range(max_exponent_bits):
        steps = int(2 ** (decade + spare + (0 if signed else 1)))
        pieces.append(10 ** (decade - max_exponent_bits + 1) * _means(steps))
    extra = 2**spare - 1  # codes without any exponent bit lie in the topmost decade
    if extra > 0:
        pieces.append(_means(int(extra)))
    values = torch.cat([pieces[0], *pieces[1:], *([-p for p in pieces[1:]] if signed else [])])
    if values.numel() != 2**total_bits:
        raise ValueError(f"{max_exponent_bits} exponent bits do not fit in {total_bits} bits")
    return _padded(values)


def _means(steps: int) -> Tensor:
    """Midpoints of `steps` equal parts of [0.1, 1], fp32."""
    boundaries = torch.linspace(0.1, 1, steps + 1, dtype=torch.float32)
    return (boundaries[:-1] + boundaries[1:]) / 2.0


def get_4bit_type(typename: str, device: torch.device | str | None = None, blocksize: int = 64) -> Tensor:
    """The 16 values of "nf4", "fp4", "int4" or "af4" (blocks of 64 only) by code, fp32, largest magnitude 1."""
    device = torch.device(device) if device is not None else default_device()
    if typename in ("nf4", "fp4"):
        return codebook(typename, device).clone()
    if typename == "int4":
        return torch.tensor([*range(7, -1, -1), *range(0, -8, -1)], dtype=torch.float32, device=device) / 7
    if typename == "af4":
        if blocksize != 64:
            raise NotImplementedError(f"af4 is defined for blocks of 64 only, got {blocksize}")
        return torch.tensor(_AF4[::-1], dtype=torch.float32, device=device)
    raise NotImplementedError(f"4-bit type {typename!r} does not exist; use nf4, fp4, int4 or af4")
