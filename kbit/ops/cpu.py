"""Operators on CPUs: C++ kernels where this machine has them, else the reference.

Nothing is compiled or loaded until an operator is first called, so that `import kbit` stays cheap. Every function here
gives what its namesake in `reference` gives: codes, scales and decoded values to the bit, products within rounding.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kbit.formats import blocks, double
from kbit.formats.spec import NESTED_BLOCK_SIZE
from kbit.ops import choose, reference
from kbit.ops.schemas import check_linear_8bit, check_weight, library, tokens

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
Scales = Sequence[Tensor | None]


def why_not() -> str | None:
    """None where the native kernels serve, else the reason in one line. Compiles them at the first question."""
    return importlib.import_module("kbit.kernels.cpu.library").why_not()


@functools.cache
def kernels(name: str) -> Any:
    """The launchers of `kbit.kernels.cpu.NAME`, or None where the reference has to serve."""
    return None if why_not() else importlib.import_module(f"kbit.kernels.cpu.{name}")


def reset() -> None:
    """Look for the native library again, after the environment changed: for tests."""
    importlib.import_module("kbit.kernels.cpu.library").reset()
    kernels.cache_clear()
    _avx512.cache_clear()


def _serves(dtype: torch.dtype, absmax: Tensor, nested_absmax: Tensor | None) -> Any:
    """The launchers of the 4-bit kernels where they take this dtype and these scales, else None."""
    if dtype not in _DTYPES or (nested_absmax is None and absmax.dtype not in (torch.float32, torch.int32)):
        return None
    return kernels("linear_4bit")


def _weight(
    kernel: Any, codes: Tensor, scales: Sequence[Tensor | None], codebook: str, block: int, n: int, k: int
) -> Any:
    """The launchers' view of `W [N, K]`. Raises RuntimeError where codes or scales are too few; C++ cannot tell."""
    absmax, nested_absmax, nested_offset = scales
    assert absmax is not None
    count = (n * k + block - 1) // block
    nested = (count + NESTED_BLOCK_SIZE - 1) // NESTED_BLOCK_SIZE
    if codes.numel() != (n * k + 1) // 2:
        check_weight(codes, n, k)
    if absmax.numel() != count:
        raise RuntimeError(f"a 4-bit weight [{n}, {k}] has {count} scales, got {absmax.numel()}")
    if nested_absmax is not None and nested_absmax.numel() != nested:
        raise RuntimeError(f"{count} scales need {nested} nested scales, got {nested_absmax.numel()}")
    return kernel.Weight(codes, absmax, nested_absmax, nested_offset, codebook, block, n, k)


def _rows(x: Tensor) -> Tensor:
    """`x [..., K]` as `[M, K]` whose rows are contiguous and do not overlap."""
    if x.dim() != 2:
        x = x.reshape(-1, x.shape[-1])
    return x if x.stride(1) == 1 and x.stride(0) >= x.shape[1] else x.contiguous()


def _bias(bias: Tensor | None, n: int, x: Tensor) -> Tensor | None:
    """The bias `[n]` as the launchers take it: in x's dtype, contiguous. RuntimeError where it has another size."""
    if bias is None:
        return None
    if bias.numel() != n:
        raise RuntimeError(f"a 4-bit weight of {n} rows takes a bias [{n}], got {list(bias.shape)}")
    return (bias if bias.dtype == x.dtype else bias.to(x.dtype)).contiguous()


def _product(kernel: Any, x: Tensor, weight: Any, bias: Tensor | None, n0: int, n1: int, out: Tensor) -> None:
    """`x [M, K] @ W[n0:n1]^T + bias` into `out`, by the way that is fastest here."""
    bias = _bias(bias, n1 - n0, x)
    path = choose.linear_4bit_cpu_path(x.shape[0], weight.k, weight.block_size, x.dtype, _amx(), _avx512())
    if path == "fused":
        kernel.fused(x, weight, bias, n0, n1, out)
    else:
        rows = choose.cpu_slice_rows(x.shape[0], x.dtype)
        with torch.no_grad():
            kernel.sliced(x, weight, bias, n0, n1, out, rows)


@functools.cache
def _amx() -> bool:
    """Whether torch's bf16 products run on AMX tiles."""
    return "amx" in torch.backends.cpu.get_cpu_capability().lower() or torch.cpu._is_amx_tile_supported()


@functools.cache
def _avx512() -> bool:
    """Whether the native kernels in use are those for AVX512."""
    return bool(importlib.import_module("kbit.kernels.cpu.library").library().level.startswith("avx512"))


def linear_4bit(x, weight, absmax, nested_absmax, nested_offset, bias, codebook, block_size, n):  # type: ignore
    kernel = _serves(x.dtype, absmax, nested_absmax)
    k = x.shape[-1]
    if kernel is None or not (n and x.numel()):
        return reference.linear_4bit(x, weight, absmax, nested_absmax, nested_offset, bias, codebook, block_size, n)
    w = _weight(kernel, weight, (absmax, nested_absmax, nested_offset), codebook, block_size, n, k)
    rows = _rows(x)
    out = x.new_empty(rows.shape[0], n)
    _product(kernel, rows, w, bias, 0, n, out)
    return out.view(*x.shape[:-1], n)


def linear_4bit_group(x, weight, absmax, nested_absmax, nested_offset, bias, codebook, block_size, n):  # type: ignore
    lists = (weight, absmax, nested_absmax, nested_offset, bias, n)
    k, m = x.shape[-1], tokens(x)
    served = [_serves(x.dtype, scales, nested) for scales, nested in zip(absmax, nested_absmax, strict=True)]
    here = all(served) and x.numel() and all(n)
    if not here or choose.linear_4bit_cpu_path(m, k, block_size, x.dtype, _amx(), _avx512()) != "fused":
        return reference.linear_4bit_group(x, *lists[:5], codebook, block_size, n)
    columns = zip(*lists, strict=True)
    weights = [_weight(served[0], codes, scales, codebook, block_size, rows, k) for codes, *scales, _, rows in columns]
    biases = [_bias(one, size, x) for one, size in zip(bias, n, strict=True)]
    rows = _rows(x)
    outs = [x.new_empty(m, one) for one in n]
    served[0].fused_group(rows, weights, biases, outs)
    return [out.view(*x.shape[:-1], out.shape[1]) for out in outs]


def linear_4bit_grad_input(grad, weight, absmax, nested_absmax, nested_offset, codebook, block_size, k):  # type: ignore
    kernel = _serves(grad.dtype, absmax, nested_absmax)
    scales = (absmax, nested_absmax, nested_offset)
    if kernel is None or not (k and grad.numel()):
        return reference.linear_4bit_grad_input(grad, weight, *scales, codebook, block_size, k)
    n, rows = grad.shape[-1], _rows(grad)
    out = grad.new_empty(rows.shape[0], k)
    w = _weight(kernel, weight, scales, codebook, block_size, n, k)
    with torch.no_grad():
        kernel.grad_input(rows, w, 0, n, out, choose.cpu_slice_columns(n, block_size, grad.dtype))
    return out.view(*grad.shape[:-1], k)


def dequantize_4bit(codes, absmax, nested_absmax, nested_offset, codebook, block_size, shape, dtype):  # type: ignore
    kernel, scales = _serves(dtype, absmax, nested_absmax), (absmax, nested_absmax, nested_offset)
    if kernel is None:
        return reference.dequantize_4bit(codes, *scales, codebook, block_size, shape, dtype)
    out = codes.new_empty(shape, dtype=dtype)
    if codes.numel() != (out.numel() + 1) // 2:
        raise ValueError(f"{codes.numel()} bytes of 4-bit codes cannot fill shape {list(shape)}")
    kernel.dequantize(codes, scales, codebook, block_size, out)
    return out


def embedding_4bit(ids, weight, absmax, nested_absmax, nested_offset, codebook, block_size, dim, dtype):  # type: ignore
    kernel, scales = _serves(dtype, absmax, nested_absmax), (absmax, nested_absmax, nested_offset)
    if kernel is None or dim < 2 or not ids.numel():
        return reference.embedding_4bit(ids, weight, *scales, codebook, block_size, dim, dtype)
    out = weight.new_empty((*ids.shape, dim), dtype=dtype)
    n = 2 * weight.numel() // dim  # half a byte more, at the end of an odd table, makes no row
    table = _weight(kernel, weight, scales, codebook, block_size, n, dim)
    kernel.embedding(ids.long().contiguous(), table, out)
    return out


def experts_4bit(x, offsets, weight, absmax, nested_absmax, nested_offset, bias, codebook, block_size, n):  # type: ignore
    kernel, scales = _serves(x.dtype, absmax, nested_absmax), (absmax, nested_absmax, nested_offset)
    if kernel is None or not (n and x.numel()):
        return reference.experts_4bit(x, offsets, weight, *scales, bias, codebook, block_size, n)
    rows = _rows(x)
    w = _weight(kernel, weight, scales, codebook, block_size, offsets.shape[0] * n, x.shape[1])
    out = x.new_empty(x.shape[0], n)
    for e, begin, end in _spans(offsets, out):
        part = None if bias is None else bias[e]
        _product(kernel, rows[begin:end], w, part, e * n, (e + 1) * n, out[begin:end])
    return out


def experts_4bit_grad_input(  # type: ignore
    grad, offsets, weight, absmax, nested_absmax, nested_offset, codebook, block_size, k
):
    kernel, scales = _serves(grad.dtype, absmax, nested_absmax), (absmax, nested_absmax, nested_offset)
    if kernel is None or not (k and grad.numel()):
        return reference.experts_4bit_grad_input(grad, offsets, weight, *scales, codebook, block_size, k)
    n, rows = grad.shape[1], _rows(grad)
    w = _weight(kernel, weight, scales, codebook, block_size, offsets.shape[0] * n, k)
    out = grad.new_empty(grad.shape[0], k)
    columns = choose.cpu_slice_columns(n, block_size, grad.dtype)
    with torch.no_grad():
        for e, begin, end in _spans(offsets, out):
            kernel.grad_input(rows[begin:end], w, e * n, (e + 1) * n, out[begin:end], columns)
    return out


def _spans(offsets: Tensor, out: Tensor) -> list[tuple[int, int, int]]:
    """(expert, first row, row behind its last) of the experts that have rows; rows of none are zeroed in out."""
    ends = offsets.tolist()
    starts = [0, *ends[:-1]]
    if ends and ends[-1] < out.shape[0]:
        out[ends[-1] :].zero_()
    return [(e, begin, end) for e, (begin, end) in enumerate(zip(starts, ends, strict=True)) if end > begin]


def quantize_4bit(x: Tensor, codebook: str, block_size: int) -> tuple[Tensor, Tensor]:
    native = kernels("quantize") if x.dtype in _DTYPES else None
    return (native or blocks).quantize_4bit(x, codebook, block_size)


def quantize_dynamic(x: Tensor, signed: bool, block_size: int) -> tuple[Tensor, Tensor]:
    native = kernels("quantize") if x.dtype in _DTYPES else None
    found = native.quantize_dynamic(x, signed, block_size) if native else None
    return found or blocks.quantize_dynamic(x, signed, block_size)


def dequantize_dynamic(codes: Tensor, absmax: Tensor, signed: bool, block_size: int, dtype: torch.dtype) -> Tensor:
    native = kernels("quantize") if dtype in _DTYPES else None
    return (native or reference).dequantize_dynamic(codes, absmax, signed, block_size, dtype)


def quantize_absmax(absmax: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    absmax = absmax.reshape(-1)
    offset = double.mean(absmax)
    codes, nested_absmax = quantize_dynamic(absmax - offset, True, NESTED_BLOCK_SIZE)
    return codes, nested_absmax, offset


def dequantize_absmax(codes: Tensor, nested_absmax: Tensor, nested_offset: Tensor) -> Tensor:
    return (kernels("quantize") or reference).dequantize_absmax(codes, nested_absmax, nested_offset)


def quantize_int8(x: Tensor) -> tuple[Tensor, Tensor]:
    native = kernels("quantize") if x.dtype in _DTYPES else None
    return (native.quantize_int8(x) if native else None) or blocks.quantize_int8(x)


def dequantize_int8(codes: Tensor, absmax: Tensor, dtype: torch.dtype) -> Tensor:
    native = kernels("quantize") if dtype in _DTYPES else None
    return (native or reference).dequantize_int8(codes, absmax, dtype)


def embedding_8bit(ids: Tensor, weight: Tensor, absmax: Tensor, dtype: torch.dtype) -> Tensor:
    rows = ids.reshape(-1).long()
    # index_select refuses a row that does not exist.
    values = dequantize_int8(weight.index_select(0, rows), absmax.index_select(0, rows), dtype)
    return values.view(*ids.shape, weight.shape[-1])


def linear_8bit(  # type: ignore[no-untyped-def]
    x, weight, absmax, bias, outlier_threshold, int8_activations=None
) -> Tensor:
    native = kernels("linear_8bit") if x.dtype in _DTYPES else None
    k = weight.shape[-1]
    if native is None or not x.numel() or k > reference.INT32_K:
        return reference.linear_8bit(x, weight, absmax, bias, outlier_threshold, int8_activations)
    m = x.numel() // x.shape[-1]
    path = choose.linear_8bit_path("cpu", m, int8_activations)
    check_linear_8bit(x, weight, absmax, bias)
    if path == "weight_only" and m > choose.cpu_fused_int8_tokens(native.vnni()):
        return F.linear(x, dequantize_int8(weight, absmax, x.dtype), bias)
    most_outliers = choose.llm_int8_outliers("cpu", m, k)
    out = native.linear_8bit(x, weight, absmax, bias, outlier_threshold, path == "llm_int8", most_outliers)
    if out is None:
        return reference.linear_8bit(x, weight, absmax, bias, outlier_threshold, int8_activations)
    return out


def linear_8bit_grad_input(grad: Tensor, weight: Tensor, absmax: Tensor) -> Tensor:
    return grad @ dequantize_int8(weight, absmax, grad.dtype)


def experts_8bit(x: Tensor, offsets: Tensor, weight: Tensor, absmax: Tensor, bias: Tensor | None) -> Tensor:
    def product(rows: Tensor, e: int) -> Tensor:
        return linear_8bit(rows, weight[e], absmax[e], None if bias is None else bias[e], 0.0, False)

    return reference.by_expert(x, offsets, weight.shape[1], product)


def experts_8bit_grad_input(grad: Tensor, offsets: Tensor, weight: Tensor, absmax: Tensor) -> Tensor:
    def product(rows: Tensor, e: int) -> Tensor:
        return linear_8bit_grad_input(rows, weight[e], absmax[e])

    return reference.by_expert(grad, offsets, weight.shape[2], product)


IMPLEMENTATIONS: dict[str, Callable[..., Any]] = {
    "linear_4bit": linear_4bit,
    "linear_4bit_group": linear_4bit_group,
    "linear_4bit_grad_input": linear_4bit_grad_input,
    "dequantize_4bit": dequantize_4bit,
    "embedding_4bit": embedding_4bit,
    "experts_4bit": experts_4bit,
    "experts_4bit_grad_input": experts_4bit_grad_input,
    "quantize_4bit": quantize_4bit,
    "quantize_absmax": quantize_absmax,
    "dequantize_absmax": dequantize_absmax,
    "quantize_int8": quantize_int8,
    "dequantize_int8": dequantize_int8,
    "quantize_dynamic": quantize_dynamic,
    "dequantize_dynamic": dequantize_dynamic,
    "linear_8bit": linear_8bit,
    "linear_8bit_grad_input": linear_8bit_grad_input,
    "embedding_8bit": embedding_8bit,
    "experts_8bit": experts_8bit,
    "experts_8bit_grad_input": experts_8bit_grad_input,
}

for _name, _function in IMPLEMENTATIONS.items():
    library.impl(_name, _function, "CPU")
