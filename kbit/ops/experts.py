"""Products over experts on GPUs: which kernel serves, and torch's grouped product over decoded weights for many rows.

Where the vendor's library has no grouped product (other GPUs and dtypes, features that are no multiple of 8), the
Triton kernels serve every number of rows. Without Triton the reference does, which waits for the routing.
"""

from __future__ import annotations

import functools
import importlib
from typing import Any

import torch
from torch import Tensor

from kbit.ops import choose, cuda, reference

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def _kernel(name: str) -> Any:
    from kbit.ops import triton

    if triton.why_not() is not None:
        return None
    module = importlib.import_module(f"kbit.kernels.triton.{name.removesuffix('_grad_input')}")
    return getattr(module, name)


@functools.cache
def _grouped_device(index: int) -> bool:
    has = hasattr(torch.nn.functional, "grouped_mm")
    return has and torch.version.cuda is not None and torch.cuda.get_device_capability(index)[0] in (9, 10)


def can_group(x: Tensor, n: int, k: int) -> bool:
    """Whether torch multiplies by experts without asking the host where their rows end: bf16 from Hopper on."""
    fits = x.dtype == torch.bfloat16 and n % 8 == 0 and k % 8 == 0 and x.device.type == "cuda"
    return fits and _grouped_device(x.device.index)


def grouped_product(x: Tensor, offsets: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`x [S, K]`, rows sorted by expert, times `weight [E, K, N]`; rows beyond the last expert's give 0."""
    out = torch.nn.functional.grouped_mm(x.contiguous(), weight, offs=offsets)
    row = torch.arange(x.shape[0], device=x.device, dtype=torch.int32)
    if bias is not None:
        expert = torch.searchsorted(offsets, row, right=True).clamp_(max=offsets.shape[0] - 1)
        out = out + bias.index_select(0, expert)
    # The library leaves nobody's rows as they were.
    return out.masked_fill_((row >= offsets[-1]).unsqueeze(1), 0.0)


def experts_4bit(x, offsets, weight, absmax, nested_absmax, nested_offset, bias, codebook, block_size, n):  # type: ignore
    kernel = _kernel("experts_4bit")
    scales = (absmax, nested_absmax, nested_offset)
    if kernel is None or x.dtype not in _DTYPES:
        return reference.experts_4bit(x, offsets, weight, *scales, bias, codebook, block_size, n)
    (rows, k), experts = x.shape, offsets.shape[0]
    if not rows or not n or not experts:
        return x.new_zeros((rows, n))
    offsets = offsets.contiguous()
    bias = None if bias is None else bias.contiguous()
    grouped = can_group(x, n, k)
    capability, aligned = cuda.capability(x), cuda.aligned(x, weight)
    path = choose.experts_4bit_path(rows, experts, n, k, block_size, x.element_size(), capability, grouped, aligned)
    if path == "grouped_mm":
        w = torch.ops.kbit.dequantize_4bit(weight, *scales, codebook, block_size, [experts, n, k], x.dtype)
        return grouped_product(x, offsets, w.transpose(1, 2), bias)
    if path == "hopper":
        kernel = cuda.experts_4bit
    return kernel(x, offsets, weight, *scales, bias, codebook, block_size, n)


def experts_4bit_grad_input(  # type: ignore[no-untyped-def]
    grad, offsets, weight, absmax, nested_absmax, nested_offset, codebook, block_size, k
) -> Tensor:
    kernel = _kernel("experts_4bit_grad_input")
    scales = (absmax, nested_absmax, nested_offset)
    if kernel is None or grad.dtype not in _DTYPES:
        return reference.experts_4bit_grad_input(grad, offsets, weight, *scales, codebook, block_size, k)
    (rows, n), experts = grad.shape, offsets.shape[0]
    if not rows or not k or not experts:
        return grad.new_zeros((rows, k))
    offsets = offsets.contiguous()
    if choose.experts_path(rows, experts, can_group(grad, n, k), choose.EXPERT_GRAD_ROWS) == "grouped_mm":
        w = torch.ops.kbit.dequantize_4bit(weight, *scales, codebook, block_size, [experts, n, k], grad.dtype)
        return grouped_product(grad, offsets, w, None)
    return kernel(grad, offsets, weight, *scales, codebook, block_size, k)


def experts_8bit(x: Tensor, offsets: Tensor, weight: Tensor, absmax: Tensor, bias: Tensor | None) -> Tensor:
    kernel = _kernel("experts_8bit")
    if kernel is None or x.dtype not in _DTYPES:
        return reference.experts_8bit(x, offsets, weight, absmax, bias)
    (experts, n, k), rows = weight.shape, x.shape[0]
    if not rows or not n or not experts:
        return x.new_zeros((rows, n))
    offsets = offsets.contiguous()
    if choose.experts_path(rows, experts, can_group(x, n, k), choose.EXPERT_ROWS) == "grouped_mm":
        w = torch.ops.kbit.dequantize_int8(weight, absmax, x.dtype)
        return grouped_product(x, offsets, w.transpose(1, 2), bias)
    return kernel(x, offsets, weight, absmax, bias)


def experts_8bit_grad_input(grad: Tensor, offsets: Tensor, weight: Tensor, absmax: Tensor) -> Tensor:
    kernel = _kernel("experts_8bit_grad_input")
    if kernel is None or grad.dtype not in _DTYPES:
        return reference.experts_8bit_grad_input(grad, offsets, weight, absmax)
    (experts, n, k), rows = weight.shape, grad.shape[0]
    if not rows or not k or not experts:
        return grad.new_zeros((rows, k))
    offsets = offsets.contiguous()
    if choose.experts_path(rows, experts, can_group(grad, n, k), choose.EXPERT_GRAD_ROWS) == "grouped_mm":
        return grouped_product(grad, offsets, torch.ops.kbit.dequantize_int8(weight, absmax, grad.dtype), None)
    return kernel(grad, offsets, weight, absmax)


IMPLEMENTATIONS = {
    "experts_4bit": experts_4bit,
    "experts_4bit_grad_input": experts_4bit_grad_input,
    "experts_8bit": experts_8bit,
    "experts_8bit_grad_input": experts_8bit_grad_input,
}
