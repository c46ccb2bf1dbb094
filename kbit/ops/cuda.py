"""CUDA C++ kernels beside the Triton ones: where they can serve, and the call into their launchers."""

from __future__ import annotations

import functools
import importlib
from typing import Any

import torch
from torch import Tensor


@functools.cache
def why_not() -> str | None:
    """None where CUDA C++ kernels can be compiled and run, else the reason in one line."""
    if not torch.cuda.is_available() and not (hasattr(torch, "xpu") and torch.xpu.is_available()):
        return "no GPU that torch can use"
    if torch.version.cuda is None or not torch.cuda.is_available():
        return "no NVIDIA GPU; Triton serves"
    devices = range(torch.cuda.device_count())
    if not any(torch.cuda.get_device_capability(device) == (9, 0) for device in devices):
        return "no Hopper GPU (compute capability 9.0); Triton serves"
    try:
        compiler = importlib.import_module("kbit.kernels.cuda.compile")
        compiler.nvrtc(), compiler.driver()
    except OSError as error:
        return f"{error}; Triton serves"
    return None


@functools.cache
def _capability(index: int) -> tuple[int, int] | None:
    return None if why_not() else torch.cuda.get_device_capability(index)


def capability(x: Tensor) -> tuple[int, int] | None:
    """Compute capability of the tensor's GPU where CUDA C++ kernels can run on it, else None."""
    return _capability(x.get_device()) if x.is_cuda else None


def aligned(x: Tensor, weight: Tensor) -> bool:
    """Whether both start on the 16-byte boundaries that Hopper's copy engine demands."""
    return x.data_ptr() % 16 == 0 and weight.data_ptr() % 16 == 0 and weight.is_contiguous()


@functools.cache
def _launcher(module: str, name: str) -> Any:
    return getattr(importlib.import_module(f"kbit.kernels.cuda.{module}"), name)


def linear_8bit(x: Tensor, weight: Tensor, absmax: Tensor, bias: Tensor | None) -> Tensor:
    return _launcher("linear_8bit", "linear_8bit")(x, weight, absmax, bias)


def linear_8bit_wide(x: Tensor, weight: Tensor, absmax: Tensor, bias: Tensor | None) -> Tensor:
    return _launcher("linear_8bit_wide", "linear_8bit")(x, weight, absmax, bias)


def llm_int8(
    x: Tensor, weight: Tensor, absmax: Tensor, bias: Tensor | None, outlier_threshold: float, limit: int
) -> Tensor:
    return _launcher("llm_int8", "llm_int8")(x, weight, absmax, bias, outlier_threshold, limit=limit)


def experts_4bit(x, offsets, weight, absmax, nested_absmax, nested_offset, bias, codebook, block_size, n):  # type: ignore
    product, scales = _launcher("linear_4bit", "linear_4bit"), (absmax, nested_absmax, nested_offset)
    return product(x, weight, *scales, bias, codebook, block_size, n, offsets=offsets)


def linear_4bit(x, weight, absmax, nested_absmax, nested_offset, bias, codebook, block_size, n):  # type: ignore
    product, scales = _launcher("linear_4bit", "linear_4bit"), (absmax, nested_absmax, nested_offset)
    return product(x, weight, *scales, bias, codebook, block_size, n)


def linear_4bit_wide(x, weight, absmax, nested_absmax, nested_offset, bias, codebook, block_size, n):  # type: ignore
    product, scales = _launcher("linear_4bit_wide", "linear_4bit"), (absmax, nested_absmax, nested_offset)
    return product(x, weight, *scales, bias, codebook, block_size, n)


def linear_4bit_group(x, weight, absmax, nested_absmax, nested_offset, bias, codebook, block_size, n):  # type: ignore
    product, scales = _launcher("linear_group", "linear_4bit_group"), (absmax, nested_absmax, nested_offset)
    return product(x, weight, *scales, bias, codebook, block_size, n)


def linear_8bit_group(x: Tensor, weight: list[Tensor], absmax: list[Tensor], bias: list[Tensor | None]) -> list[Tensor]:
    return _launcher("linear_group", "linear_8bit_group")(x, weight, absmax, bias)


def linear_4bit_grad_input(grad, weight, absmax, nested_absmax, nested_offset, codebook, block_size, k):  # type: ignore
    product, scales = (
        _launcher("linear_4bit_grad_input", "linear_4bit_grad_input"),
        (absmax, nested_absmax, nested_offset),
    )
    return product(grad, weight, *scales, codebook, block_size, k)


def quantizes_4bit(x: Tensor, block_size: int) -> bool:
    """Whether the Hopper kernel can quantize this tensor."""
    return capability(x) == (9, 0) and _launcher("quantize_4bit", "fits")(x, block_size)


def quantize_4bit(x: Tensor, codebook: str, block_size: int) -> tuple[Tensor, Tensor]:
    return _launcher("quantize_4bit", "quantize_4bit")(x, codebook, block_size)
