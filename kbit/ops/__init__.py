"""Operators: what modules and users call. A layer's forward is `linear_4bit` -> operator -> backend implementation.

The raw operators (`torch.ops.kbit.*`) have fakes for compilation and no autograd rule; the functions here add the
backward rule where a gradient is asked for, and follow autocast as torch's own layers do.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kbit.ops import cpu, reference, triton  # noqa: F401  (define and implement the operators; no Triton import yet)
from kbit.ops.autograd import (
    Experts4bitFunction,
    Experts8bitFunction,
    Linear4bitFunction,
    Linear8bitFunction,
    SwitchBackFunction,
)
from kbit.ops.backends import Backend, backends
from kbit.ops.quantize import dequantize, quantize

__all__ = [
    "Backend",
    "backends",
    "dequantize",
    "embedding_4bit",
    "embedding_8bit",
    "experts_4bit",
    "experts_8bit",
    "linear_4bit",
    "linear_8bit",
    "quantize",
    "switchback_linear",
]


# Looked up once: an eager call at few tokens is bound by the CPU.
_linear_4bit = torch.ops.kbit.linear_4bit.default
_linear_8bit = torch.ops.kbit.linear_8bit.default


def _prepare(x: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None, bool]:
    """Cast to autocast's dtype where it is on; tell whether a gradient is needed."""
    if not x.is_floating_point() or x.dtype.itemsize == 1:
        raise TypeError(f"a quantized linear layer needs floating point input of 16 bits or more, got {x.dtype}")
    if x.dtype != torch.float64 and not x.is_meta and torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    if bias is not None and bias.dtype != x.dtype:
        bias = bias.to(x.dtype)
    grad = torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad))
    return x, bias, grad


def linear_4bit(
    x: Tensor,
    weight: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    bias: Tensor | None,
    codebook: str,
    block_size: int,
    n: int,
) -> Tensor:
    """`x [..., K] @ W [N, K]^T + bias` with W in 4 bits; the result has x's dtype (autocast's where it is on).

    weight, absmax, nested_absmax, nested_offset, codebook, block_size: as in `kbit.ops.schemas`; n: out features.
    Equals the product with the weight dequantized to x's dtype, accumulated in fp32. Differentiable in x and bias.
    Raises TypeError for input that is not floating point.
    """
    x, bias, grad = _prepare(x, bias)
    call = Linear4bitFunction.apply if grad else _linear_4bit
    return call(x, weight, absmax, nested_absmax, nested_offset, bias, codebook, block_size, n)


def linear_8bit(
    x: Tensor,
    weight: Tensor,
    absmax: Tensor,
    bias: Tensor | None,
    outlier_threshold: float,
    int8_activations: bool | None = None,
) -> Tensor:
    """`x [..., K] @ W [N, K]^T + bias` with W in int8 and one scale a row: LLM.int8() (arXiv 2208.07339).

    At few tokens the activations stay as they are and only the weight is read in 8 bits. Above that both are int8, but
    for the feature columns that hold a magnitude of at least `outlier_threshold` (0: none). int8_activations: True and
    False ask for the second and the first way at any number of tokens; None goes by `kbit.ops.choose`.
    The result has x's dtype. Differentiable in x (through the dequantized weight) and bias.
    """
    x, bias, grad = _prepare(x, bias)
    call = Linear8bitFunction.apply if grad else _linear_8bit
    return call(x, weight, absmax, bias, outlier_threshold, int8_activations)


def switchback_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    outlier_threshold: float = 0.0,
    int8_gradient: bool = True,
    int8_activations: bool | None = None,
    codes: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """`x [..., K] @ W [N, K]^T + bias` in int8 with a floating point weight that trains (SwitchBack, arXiv 2304.13013).

    The weight is quantized row by row in every call, unless `codes` gives (int8 `[N, K]`, fp32 scales `[N]`) of it. The
    gradient to the weight is a product in x's dtype; the one to x is in int8 where int8_gradient says so, else through
    the dequantized codes. outlier_threshold, int8_activations: as in `linear_8bit`. The result has x's dtype.
    """
    x, _, _ = _prepare(x, None)
    parts = torch.ops.kbit.quantize_int8(weight.detach()) if codes is None else codes
    inputs = (x, weight) if bias is None else (x, weight, bias)
    if not (torch.is_grad_enabled() and any(t.requires_grad for t in inputs)):
        bias = None if bias is None else bias.to(x.dtype)
        return torch.ops.kbit.linear_8bit(x, *parts, bias, outlier_threshold, int8_activations)
    return SwitchBackFunction.apply(x, weight, bias, *parts, outlier_threshold, int8_activations, int8_gradient)


def experts_4bit(
    x: Tensor,
    offsets: Tensor,
    weight: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    bias: Tensor | None,
    codebook: str,
    block_size: int,
    n: int,
) -> Tensor:
    """Row s of `x [S, K]` times `W[e] [N, K]^T + bias[e]` of its expert e, with `W [E, N, K]` in 4 bits: `[S, N]`.

    Rows are sorted by expert. offsets: int32 `[E]` on x's device, where the rows of each expert end; rows beyond the
    last give 0. bias: `[E, N]`. The other arguments, result, gradients and errors as in `linear_4bit`.
    """
    x, bias, grad = _prepare(x, bias)
    call = Experts4bitFunction.apply if grad else torch.ops.kbit.experts_4bit
    return call(x, offsets, weight, absmax, nested_absmax, nested_offset, bias, codebook, block_size, n)


def experts_8bit(x: Tensor, offsets: Tensor, weight: Tensor, absmax: Tensor, bias: Tensor | None) -> Tensor:
    """As `experts_4bit`, with W in int8 `[E, N, K]` and one scale a row, absmax `[E, N]`.

    The activations are never quantized: an expert sees few tokens, and its product is bound by the weight's bytes.
    """
    x, bias, grad = _prepare(x, bias)
    call = Experts8bitFunction.apply if grad else torch.ops.kbit.experts_8bit
    return call(x, offsets, weight, absmax, bias)


def embedding_4bit(
    ids: Tensor,
    weight: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    codebook: str,
    block_size: int,
    dim: int,
    dtype: torch.dtype,
) -> Tensor:
    """Rows `ids [...]` of a 4-bit table `[rows, dim]`, decoded to `[..., dim]` in `dtype`.

    weight, absmax, nested_absmax, nested_offset, codebook, block_size: as in `kbit.ops.schemas`.
    Raises TypeError for ids that are not integers; the device reports an id out of range as for torch's embedding.
    """
    _check_ids(ids)
    return torch.ops.kbit.embedding_4bit(
        ids, weight, absmax, nested_absmax, nested_offset, codebook, block_size, dim, dtype
    )


def embedding_8bit(ids: Tensor, weight: Tensor, absmax: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows `ids [...]` of an int8 table `[rows, dim]` with scales `absmax [rows]`, as `[..., dim]` in `dtype`."""
    _check_ids(ids)
    return torch.ops.kbit.embedding_8bit(ids, weight, absmax, dtype)


def _check_ids(ids: Tensor) -> None:
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise TypeError(f"an embedding needs integer ids, got {ids.dtype}")
