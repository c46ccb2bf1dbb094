"""Operators on GPUs: Triton kernels, and CUDA C++ where it is faster. Without Triton the reference serves.

Nothing is imported until an operator first meets a tensor on a GPU, so that `import kbit` stays cheap.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kbit.formats import blocks
from kbit.ops import choose, cuda, experts, reference
from kbit.ops.schemas import check_linear_4bit, check_linear_8bit, library, tokens

# torch's name for the kernels of NVIDIA and AMD GPUs, and of Intel's.
DISPATCH_KEYS = ("CUDA", "XPU")
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@functools.cache
def why_not() -> str | None:
    """None where Triton can serve, else the reason in one line."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed: pip install 'kbit[triton]'"
    try:
        importlib.import_module("triton")
    except Exception as error:  # a broken installation must not break the operators that do without
        return f"triton cannot be imported: {error}"
    return None


@functools.cache
def _kernel(name: str) -> Any:
    """The launcher of one operation, or None where the reference has to serve."""
    if why_not() is not None:
        return None
    return getattr(importlib.import_module(f"kbit.kernels.triton.{name}"), name)


def quantize_4bit(x: Tensor, codebook: str, block_size: int) -> tuple[Tensor, Tensor]:
    kernel = _kernel("quantize_4bit")
    if kernel is None:
        return blocks.quantize_4bit(x, codebook, block_size)
    if cuda.quantizes_4bit(x, block_size):
        return cuda.quantize_4bit(x, codebook, block_size)
    return kernel(x, codebook, block_size)


def dequantize_4bit(codes, absmax, nested_absmax, nested_offset, codebook, block_size, shape, dtype):  # type: ignore
    kernel = _kernel("dequantize_4bit")
    if kernel is None or dtype not in _DTYPES:
        kernel = reference.dequantize_4bit
    return kernel(codes, absmax, nested_absmax, nested_offset, codebook, block_size, shape, dtype)


def linear_4bit(x, weight, absmax, nested_absmax, nested_offset, bias, codebook, block_size, n):  # type: ignore
    check_linear_4bit(x, weight, absmax, bias, block_size, n)
    kernel = _kernel("linear_4bit")
    if kernel is None or x.dtype not in _DTYPES:
        return reference.linear_4bit(x, weight, absmax, nested_absmax, nested_offset, bias, codebook, block_size, n)
    m, k = tokens(x), x.shape[-1]
    if bias is not None and not bias.is_contiguous():
        bias = bias.contiguous()  # launchers pass its address
    capability, aligned = cuda.capability(x), cuda.aligned(x, weight)
    path = choose.linear_4bit_path(m, n, k, block_size, x.element_size(), capability, aligned)
    if path in ("hopper", "hopper_wide"):
        path = "dequantize" if not m or not n else path
        kernel = cuda.linear_4bit if path == "hopper" else cuda.linear_4bit_wide
    if path != "dequantize":
        return kernel(x, weight, absmax, nested_absmax, nested_offset, bias, codebook, block_size, n)
    w = dequantize_4bit(weight, absmax, nested_absmax, nested_offset, codebook, block_size, (n, k), x.dtype)
    return F.linear(x, w, bias)


def linear_4bit_group(x, weight, absmax, nested_absmax, nested_offset, bias, codebook, block_size, n):  # type: ignore
    arguments = (x, weight, absmax, nested_absmax, nested_offset, bias, codebook, block_size, n)
    for one, scales, own, rows in zip(weight, absmax, bias, n, strict=True):
        check_linear_4bit(x, one, scales, own, block_size, rows)
    alike = len({one is None for one in nested_absmax}) == 1
    if _kernel("linear_4bit") is not None and x.dtype in _DTYPES and alike:
        m, k, aligned = tokens(x), x.shape[-1], all(cuda.aligned(x, one) for one in weight)
        path = choose.linear_4bit_group_path(m, n, k, block_size, x.element_size(), cuda.capability(x), aligned)
        if path == "hopper":
            biases = [None if one is None else one.contiguous() for one in bias]
            return cuda.linear_4bit_group(*arguments[:5], biases, *arguments[6:])
    return reference.linear_4bit_group(*arguments)


def linear_4bit_grad_input(grad, weight, absmax, nested_absmax, nested_offset, codebook, block_size, k):  # type: ignore
    kernel = _kernel("linear_4bit_grad_input")
    scales = (absmax, nested_absmax, nested_offset)
    if kernel is not None and grad.dtype in _DTYPES:
        m, n = tokens(grad), grad.shape[-1]
        capability, aligned = cuda.capability(grad), cuda.aligned(grad, weight)
        path = choose.linear_4bit_grad_path(m, n, k, block_size, grad.element_size(), capability, aligned)
        if path == "hopper":
            return cuda.linear_4bit_grad_input(grad, weight, *scales, codebook, block_size, k)
        if path == "triton":
            return kernel(grad, weight, *scales, codebook, block_size, k)
    return grad @ dequantize_4bit(weight, *scales, codebook, block_size, (grad.shape[-1], k), grad.dtype)


def quantize_int8(x: Tensor) -> tuple[Tensor, Tensor]:
    kernel = _kernel("quantize_int8")
    return blocks.quantize_int8(x) if kernel is None else kernel(x)


def dequantize_int8(codes: Tensor, absmax: Tensor, dtype: torch.dtype) -> Tensor:
    kernel = _kernel("dequantize_int8")
    if kernel is None or dtype not in _DTYPES:
        kernel = reference.dequantize_int8
    return kernel(codes, absmax, dtype)


def linear_8bit(  # type: ignore[no-untyped-def]
    x, weight, absmax, bias, outlier_threshold, int8_activations=None
) -> Tensor:
    check_linear_8bit(x, weight, absmax, bias)
    m, (n, k) = tokens(x), weight.shape
    path = choose.linear_8bit_path(x.device.type, m, int8_activations)
    few = path == "weight_only"
    kernel = _kernel("linear_8bit" if few else "llm_int8")
    if kernel is None or x.dtype not in _DTYPES or not m or not n or (not few and k > reference.INT32_K):
        return reference.linear_8bit(x, weight, absmax, bias, outlier_threshold, int8_activations)
    capability, aligned = cuda.capability(x), cuda.aligned(x, weight)
    if bias is not None:
        bias = bias.to(x.dtype).contiguous()
    absmax = absmax.contiguous()
    found = choose.linear_8bit_kernel(path, m, n, k, x.element_size(), capability, aligned)
    if found == "hopper":
        kernel = cuda.linear_8bit if few else cuda.llm_int8
    elif found == "hopper_wide":
        kernel = cuda.linear_8bit_wide
    elif found == "dequantize":
        return F.linear(x, dequantize_int8(weight, absmax, x.dtype), bias)
    if few:
        return kernel(x, weight, absmax, bias)
    return kernel(x, weight, absmax, bias, outlier_threshold, limit=choose.llm_int8_outliers("cuda", m, k))


def linear_8bit_group(  # type: ignore[no-untyped-def]
    x, weight, absmax, bias, outlier_threshold, int8_activations=None
) -> list[Tensor]:
    for one, scales, own in zip(weight, absmax, bias, strict=True):
        check_linear_8bit(x, one, scales, own)
    m, n = tokens(x), [one.shape[0] for one in weight]
    if _kernel("linear_8bit") is not None and x.dtype in _DTYPES:
        aligned = all(cuda.aligned(x, one) for one in weight)
        path = choose.linear_8bit_path(x.device.type, m, int8_activations)
        capability = cuda.capability(x)
        if choose.linear_8bit_group_path(path, m, n, x.shape[-1], x.element_size(), capability, aligned) == "hopper":
            biases = [None if one is None else one.to(x.dtype).contiguous() for one in bias]
            return cuda.linear_8bit_group(x, weight, [one.contiguous() for one in absmax], biases)
    return reference.linear_8bit_group(x, weight, absmax, bias, outlier_threshold, int8_activations)


def linear_8bit_grad_input(grad: Tensor, weight: Tensor, absmax: Tensor) -> Tensor:
    kernel = _kernel("linear_8bit_grad_input")
    if kernel is not None and grad.dtype in _DTYPES and choose.linear_8bit_grad_path(tokens(grad)) == "triton":
        return kernel(grad, weight, absmax)
    return grad @ dequantize_int8(weight, absmax, grad.dtype)


def embedding_8bit(ids: Tensor, weight: Tensor, absmax: Tensor, dtype: torch.dtype) -> Tensor:
    rows = ids.reshape(-1).long()
    # index_select refuses a row that does not exist.
    values = dequantize_int8(weight.index_select(0, rows), absmax.index_select(0, rows), dtype)
    return values.view(*ids.shape, weight.shape[-1])


IMPLEMENTATIONS = {
    "quantize_4bit": quantize_4bit,
    "dequantize_4bit": dequantize_4bit,
    "linear_4bit": linear_4bit,
    "linear_4bit_group": linear_4bit_group,
    "linear_4bit_grad_input": linear_4bit_grad_input,
    "quantize_int8": quantize_int8,
    "dequantize_int8": dequantize_int8,
    "linear_8bit": linear_8bit,
    "linear_8bit_group": linear_8bit_group,
    "linear_8bit_grad_input": linear_8bit_grad_input,
    "embedding_8bit": embedding_8bit,
    **experts.IMPLEMENTATIONS,
}

for _name, _function in IMPLEMENTATIONS.items():
    for _key in DISPATCH_KEYS:
        library.impl(_name, _function, _key)
