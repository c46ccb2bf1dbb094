"""Every operator of the `kbit` library: its schema and its fake (meta) implementation.

Conventions. Packed 4-bit codes are uint8 in flat order, whatever shape they are stored in. `absmax` of a 4-bit tensor
is fp32, or the bits of fp32 as int32 (how modules hold it, so that no cast can touch it), or, with `nested_absmax`
and `nested_offset` given, the uint8 codes of double quantization. The nested tensors are fp32 or their bits too.
`codebook` is "nf4" or "fp4". A weight stands for `W [N, K]`; `x` is `[..., K]`.

`linear_4bit_group` and `linear_8bit_group` are several products that share `x`: lists with one entry a weight, and a
list of results.

Products over experts take the weights of all of them, `W [E, N, K]`, and rows `x [S, K]` that are sorted by expert:
those of expert e end before row `offsets[e]` (int32 `[E]`, on x's device). Rows beyond the last expert's give 0.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

library = torch.library.Library("kbit", "DEF")

_SCALES = "Tensor absmax, Tensor? nested_absmax, Tensor? nested_offset"
SCHEMAS = {
    "quantize_4bit": "(Tensor x, str codebook, int block_size) -> (Tensor, Tensor)",
    "dequantize_4bit": f"(Tensor codes, {_SCALES}, str codebook, int block_size, SymInt[] shape, ScalarType dtype)"
    " -> Tensor",
    "quantize_absmax": "(Tensor absmax) -> (Tensor, Tensor, Tensor)",
    "dequantize_absmax": "(Tensor codes, Tensor nested_absmax, Tensor nested_offset) -> Tensor",
    "quantize_int8": "(Tensor x) -> (Tensor, Tensor)",
    "dequantize_int8": "(Tensor codes, Tensor absmax, ScalarType dtype) -> Tensor",
    "quantize_dynamic": "(Tensor x, bool signed, int block_size) -> (Tensor, Tensor)",
    "dequantize_dynamic": "(Tensor codes, Tensor absmax, bool signed, int block_size, ScalarType dtype) -> Tensor",
    "linear_4bit": f"(Tensor x, Tensor weight, {_SCALES}, Tensor? bias, str codebook, int block_size, SymInt n)"
    " -> Tensor",
    "linear_4bit_group": "(Tensor x, Tensor[] weight, Tensor[] absmax, Tensor?[] nested_absmax,"
    " Tensor?[] nested_offset, Tensor?[] bias, str codebook, int block_size, SymInt[] n) -> Tensor[]",
    "linear_4bit_grad_input": f"(Tensor grad, Tensor weight, {_SCALES}, str codebook, int block_size, SymInt k)"
    " -> Tensor",
    "linear_8bit": "(Tensor x, Tensor weight, Tensor absmax, Tensor? bias, float outlier_threshold,"
    " bool? int8_activations=None) -> Tensor",
    "linear_8bit_group": "(Tensor x, Tensor[] weight, Tensor[] absmax, Tensor?[] bias, float outlier_threshold,"
    " bool? int8_activations=None) -> Tensor[]",
    "linear_8bit_grad_input": "(Tensor grad, Tensor weight, Tensor absmax) -> Tensor",
    "experts_4bit": f"(Tensor x, Tensor offsets, Tensor weight, {_SCALES}, Tensor? bias, str codebook, int block_size,"
    " SymInt n) -> Tensor",
    "experts_4bit_grad_input": f"(Tensor grad, Tensor offsets, Tensor weight, {_SCALES}, str codebook, int block_size,"
    " SymInt k) -> Tensor",
    "experts_8bit": "(Tensor x, Tensor offsets, Tensor weight, Tensor absmax, Tensor? bias) -> Tensor",
    "experts_8bit_grad_input": "(Tensor grad, Tensor offsets, Tensor weight, Tensor absmax) -> Tensor",
    "embedding_4bit": f"(Tensor ids, Tensor weight, {_SCALES}, str codebook, int block_size, SymInt dim,"
    " ScalarType dtype) -> Tensor",
    "embedding_8bit": "(Tensor ids, Tensor weight, Tensor absmax, ScalarType dtype) -> Tensor",
}

for _name, _schema in SCHEMAS.items():
    library.define(_name + _schema, tags=(torch.Tag.pt2_compliant_tag,))


def _fake(function):
    return torch.library.register_fake(f"kbit::{function.__name__}", function, lib=library)


@_fake
def quantize_4bit(x: Tensor, codebook: str, block_size: int) -> tuple[Tensor, Tensor]:
    count = x.numel()
    absmax = x.new_empty((count + block_size - 1) // block_size, dtype=torch.float32)
    return x.new_empty((count + 1) // 2, dtype=torch.uint8), absmax


@_fake
def dequantize_4bit(codes, absmax, nested_absmax, nested_offset, codebook, block_size, shape, dtype):
    return codes.new_empty(shape, dtype=dtype)


@_fake
def quantize_absmax(absmax: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    blocks = (absmax.numel() + 255) // 256
    return absmax.new_empty(absmax.numel(), dtype=torch.uint8), absmax.new_empty(blocks), absmax.new_empty(1)


@_fake
def dequantize_absmax(codes: Tensor, nested_absmax: Tensor, nested_offset: Tensor) -> Tensor:
    return codes.new_empty(codes.shape, dtype=torch.float32)


@_fake
def quantize_int8(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=torch.int8), x.new_empty(x.shape[:-1], dtype=torch.float32)


@_fake
def dequantize_int8(codes: Tensor, absmax: Tensor, dtype: torch.dtype) -> Tensor:
    return codes.new_empty(codes.shape, dtype=dtype)


@_fake
def quantize_dynamic(x: Tensor, signed: bool, block_size: int) -> tuple[Tensor, Tensor]:
    absmax = x.new_empty((x.numel() + block_size - 1) // block_size, dtype=torch.float32)
    return x.new_empty(x.shape, dtype=torch.uint8), absmax


@_fake
def dequantize_dynamic(codes, absmax, signed, block_size, dtype):
    return codes.new_empty(codes.shape, dtype=dtype)


def check_weight(weight: Tensor, n: int, k: int) -> None:
    torch._check(
        weight.numel() == (n * k + 1) // 2,
        lambda: f"a 4-bit weight [{n}, {k}] has {(n * k + 1) // 2} bytes of codes, got {weight.numel()}",
    )


def check_linear_4bit(x: Tensor, weight: Tensor, absmax: Tensor, bias: Tensor | None, block_size: int, n: int) -> None:
    """Raise RuntimeError where kernels, which go by n and x, would read beyond the weight, its scales or the bias."""
    k = x.shape[-1]
    if weight.numel() != (n * k + 1) // 2:
        check_weight(weight, n, k)
    blocks = -(-n * k // block_size)
    if absmax.numel() != blocks:
        raise RuntimeError(f"a 4-bit weight [{n}, {k}] has {blocks} scales of {block_size}, got {absmax.numel()}")
    if bias is not None and bias.numel() != n:
        raise RuntimeError(f"a 4-bit weight of {n} rows takes a bias [{n}], got {list(bias.shape)}")


def check_linear_8bit(x: Tensor, weight: Tensor, absmax: Tensor, bias: Tensor | None) -> None:
    """The same for an int8 weight `[N, K]`."""
    n, k = weight.shape
    if x.shape[-1] != k:
        raise RuntimeError(f"an int8 weight [{n}, {k}] takes input of {k} features, got shape {list(x.shape)}")
    if absmax.numel() != n:
        raise RuntimeError(f"an int8 weight of {n} rows has {n} scales, got {absmax.numel()}")
    if bias is not None and bias.numel() != n:
        raise RuntimeError(f"an int8 weight of {n} rows takes a bias [{n}], got {list(bias.shape)}")


@_fake
def linear_4bit(x, weight, absmax, nested_absmax, nested_offset, bias, codebook, block_size, n):
    check_weight(weight, n, x.shape[-1])
    return x.new_empty((*x.shape[:-1], n))


def _check_group(weights: Sequence[Tensor], **lists: Sequence[object]) -> None:
    for name, given in lists.items():
        if len(given) != len(weights):
            raise RuntimeError(f"a group of {len(weights)} weights has {len(given)} values of {name}")


@_fake
def linear_4bit_group(x, weight, absmax, nested_absmax, nested_offset, bias, codebook, block_size, n):
    _check_group(weight, absmax=absmax, nested_absmax=nested_absmax, nested_offset=nested_offset, bias=bias, n=n)
    for one, rows in zip(weight, n, strict=True):
        check_weight(one, rows, x.shape[-1])
    return [x.new_empty((*x.shape[:-1], rows)) for rows in n]


@_fake
def linear_8bit_group(x, weight, absmax, bias, outlier_threshold, int8_activations=None):
    _check_group(weight, absmax=absmax, bias=bias)
    for one in weight:
        k = one.shape[-1]
        torch._check(x.shape[-1] == k, lambda k=k: f"x has {x.shape[-1]} features, the weight {k}")
    return [x.new_empty((*x.shape[:-1], one.shape[0])) for one in weight]


@_fake
def linear_4bit_grad_input(grad, weight, absmax, nested_absmax, nested_offset, codebook, block_size, k):
    check_weight(weight, grad.shape[-1], k)
    return grad.new_empty((*grad.shape[:-1], k))


@_fake
def linear_8bit(x, weight, absmax, bias, outlier_threshold, int8_activations=None):
    k = weight.shape[-1]
    torch._check(x.shape[-1] == k, lambda: f"x has {x.shape[-1]} features, the weight {k}")
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


@_fake
def linear_8bit_grad_input(grad, weight, absmax):
    return grad.new_empty((*grad.shape[:-1], weight.shape[-1]))


def _check_experts(x: Tensor, offsets: Tensor) -> None:
    torch._check(x.dim() == 2, lambda: f"a product over experts takes rows [S, features], got shape {list(x.shape)}")
    torch._check(
        offsets.dim() == 1 and offsets.dtype == torch.int32,
        lambda: f"offsets must be int32 [E], got {offsets.dtype} {list(offsets.shape)}",
    )


@_fake
def experts_4bit(x, offsets, weight, absmax, nested_absmax, nested_offset, bias, codebook, block_size, n):
    _check_experts(x, offsets)
    check_weight(weight, offsets.shape[0] * n, x.shape[1])
    return x.new_empty((x.shape[0], n))


@_fake
def experts_4bit_grad_input(grad, offsets, weight, absmax, nested_absmax, nested_offset, codebook, block_size, k):
    _check_experts(grad, offsets)
    check_weight(weight, offsets.shape[0] * grad.shape[1], k)
    return grad.new_empty((grad.shape[0], k))


@_fake
def experts_8bit(x, offsets, weight, absmax, bias):
    _check_experts(x, offsets)
    k = weight.shape[-1]
    torch._check(x.shape[1] == k, lambda: f"x has {x.shape[1]} features, the weights {k}")
    return x.new_empty((x.shape[0], weight.shape[1]))


@_fake
def experts_8bit_grad_input(grad, offsets, weight, absmax):
    _check_experts(grad, offsets)
    return grad.new_empty((grad.shape[0], weight.shape[-1]))


@_fake
def embedding_4bit(ids, weight, absmax, nested_absmax, nested_offset, codebook, block_size, dim, dtype):
    return weight.new_empty((*ids.shape, dim), dtype=dtype)


@_fake
def embedding_8bit(ids, weight, absmax, dtype):
    return weight.new_empty((*ids.shape, weight.shape[-1]), dtype=dtype)


def tokens(x: Tensor) -> int:
    """M: rows of `x [..., K]` once its leading dimensions are flattened."""
    return math.prod(x.shape[:-1])
