"""CUDA C++ kernels beside the Triton ones: where they can serve, and the call into their launchers."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor


@functools.cache
def why_not() -> str | None:
    """None where CUDA C++ kernels can be compiled and run, else the reason in one line."""
    return "not built yet"


@functools.cache
def _capability(index: int) -> tuple[int, int] | None:
    return None if why_not() else torch.cuda.get_device_capability(index)


def capability(x: Tensor) -> tuple[int, int] | None:
    """Compute capability of the tensor's GPU where CUDA C++ kernels can run on it, else None."""
    return _capability(x.device.index) if x.device.type == "cuda" else None


def aligned(x: Tensor, weight: Tensor) -> bool:
    """Whether Hopper's copy engine can read both: 16-byte starts, rows of x a multiple of 16 bytes apart."""
    rows_ok = x.stride(-1) == 1 and (x.dim() < 2 or x.stride(-2) * x.element_size() % 16 == 0)
    return rows_ok and x.data_ptr() % 16 == 0 and weight.data_ptr() % 16 == 0 and weight.is_contiguous()


def linear_4bit(*args: Any) -> Tensor:
    raise NotImplementedError
