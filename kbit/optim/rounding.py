"""Rounding of bf16 parameters with random bits, the same on every device and repeatable.

Stochastic rounding adds 16 random bits below the bits that bf16 keeps and cuts: the expected value is the fp32 value,
so updates far smaller than a bf16 step still count (Gupta et al. 2015, arXiv 1502.02551). The bits come from a hash
of element index, step and parameter number, so a resumed run draws the same ones.
"""

from __future__ import annotations

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF


def _scramble(x: Tensor) -> Tensor:
    """A 32-bit mixing hash on int64 tensors that hold unsigned 32-bit numbers."""
    x = x ^ (x >> 16)
    x = (x * 0x7FEB352D) & _MASK
    x = x ^ (x >> 15)
    x = (x * 0x846CA68B) & _MASK
    return x ^ (x >> 16)


def noise_bits(count: int, seed: int, step: int, device: torch.device) -> Tensor:
    """int64 `[count]` random numbers in 0..65535, a function of element index, seed and step."""
    key = _scramble(torch.tensor((step * 0x9E3779B9 + seed) & _MASK, device=device))
    index = torch.arange(count, device=device)
    low, high = index & _MASK, index >> 32
    return _scramble((low + key + high * 0x85EBCA6B) & _MASK) & 0xFFFF


def round_to(x: Tensor, dtype: torch.dtype, seed: int, step: int) -> Tensor:
    """fp32 to bf16, stochastically. Infinities and NaN stay what they are."""
    if dtype != torch.bfloat16:
        raise ValueError(f"stochastic rounding is for bfloat16 parameters, not {dtype}")
    bits = x.contiguous().view(torch.int32).reshape(-1).to(torch.int64) & _MASK
    cut = ((bits + noise_bits(x.numel(), seed, step, x.device)) & 0xFFFF0000).to(torch.int64)
    cut = torch.where(cut >= 1 << 31, cut - (1 << 32), cut).to(torch.int32)
    rounded = cut.view(torch.float32).view(x.shape)
    return torch.where(x.isfinite(), rounded, x).to(torch.bfloat16)
