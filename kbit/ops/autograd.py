"""Backward rules of the products. The gradient to the input goes through the dequantized weight.

Packed weights travel through `save_for_backward`, so that checkpointing, offloading hooks and version counters see
them; their scales stay beside them, with version counters of their own. The quantized weight itself has no gradient; a
bias may.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_ops = torch.ops.kbit


def _bias_grad(grad: Tensor) -> Tensor:
    return grad.reshape(-1, grad.shape[-1]).sum(dim=0)


def _version(tensor: Tensor | None) -> int:
    return 0 if tensor is None or tensor.is_inference() else tensor._version


def _save(ctx: Any, weight: Tensor, *scales: Tensor | None) -> None:
    """Keep a frozen weight for the backward pass. Every saved tensor costs a checkpointed layer some 40 microseconds of
    the host's time, so scales are kept on ctx, and `_saved` looks at their version counters as autograd would."""
    if torch.compiler.is_compiling():
        ctx.scales = None
        ctx.save_for_backward(weight, *scales)
    else:
        ctx.save_for_backward(weight)
        ctx.scales, ctx.versions = scales, [_version(scale) for scale in scales]


def _saved(ctx: Any) -> tuple[Tensor | None, ...]:
    """(weight, *scales) as `_save` kept them. Raises RuntimeError where scales were overwritten since."""
    if ctx.scales is None:
        return ctx.saved_tensors
    # A compiler of backward passes cannot read version counters.
    if not torch.compiler.is_compiling() and [_version(scale) for scale in ctx.scales] != ctx.versions:
        raise RuntimeError(
            "one of the variables needed for gradient computation has been modified by an inplace operation: scales "
            "of a quantized weight. Change quantized weights between backward and the next forward only"
        )
    return (*ctx.saved_tensors, *ctx.scales)


class Linear4bitFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, absmax, nested_absmax, nested_offset, bias, codebook, block_size, n):
        _save(ctx, weight, absmax, nested_absmax, nested_offset)
        ctx.codebook, ctx.block_size, ctx.k = codebook, block_size, x.shape[-1]
        scales = (absmax, nested_absmax, nested_offset)
        return _ops.linear_4bit.default(x, weight, *scales, bias, codebook, block_size, n)

    @staticmethod
    def backward(ctx, grad):
        x_grad = bias_grad = None
        if ctx.needs_input_grad[0]:
            # The rule for second derivatives costs the host as much as the operator, so it goes where it is asked for.
            again = torch.is_grad_enabled()
            gradient = _LinearGrad4bitFunction.apply if again else _ops.linear_4bit_grad_input.default
            x_grad = gradient(grad, *_saved(ctx), ctx.codebook, ctx.block_size, ctx.k)
        if ctx.needs_input_grad[5]:
            bias_grad = _bias_grad(grad)
        return x_grad, None, None, None, None, bias_grad, None, None, None


class _LinearGrad4bitFunction(torch.autograd.Function):
    """grad [..., N] -> grad W [..., K]; differentiable again, so that second derivatives work."""

    @staticmethod
    def forward(ctx, grad, weight, absmax, nested_absmax, nested_offset, codebook, block_size, k):
        ctx.save_for_backward(weight, absmax, nested_absmax, nested_offset)
        ctx.codebook, ctx.block_size, ctx.n = codebook, block_size, grad.shape[-1]
        return _ops.linear_4bit_grad_input(grad, weight, absmax, nested_absmax, nested_offset, codebook, block_size, k)

    @staticmethod
    def backward(ctx, grad):
        weight, absmax, nested_absmax, nested_offset = ctx.saved_tensors
        out = Linear4bitFunction.apply(
            grad, weight, absmax, nested_absmax, nested_offset, None, ctx.codebook, ctx.block_size, ctx.n
        )
        return out, None, None, None, None, None, None, None


class Linear8bitFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, absmax, bias, outlier_threshold, int8_activations):
        _save(ctx, weight, absmax)
        return _ops.linear_8bit.default(x, weight, absmax, bias, outlier_threshold, int8_activations)

    @staticmethod
    def backward(ctx, grad):
        x_grad = None
        if ctx.needs_input_grad[0]:
            again = torch.is_grad_enabled()
            gradient = _LinearGrad8bitFunction.apply if again else _ops.linear_8bit_grad_input.default
            x_grad = gradient(grad, *_saved(ctx))
        bias_grad = _bias_grad(grad) if ctx.needs_input_grad[3] else None
        return x_grad, None, None, bias_grad, None, None


class SwitchBackFunction(torch.autograd.Function):
    """A product with int8 codes of a weight that stays in floating point and trains: codes in forward, and straight
    through them in backward. int8_gradient multiplies the gradient to the input in int8 too."""

    @staticmethod
    def forward(ctx, x, weight, bias, codes, absmax, outlier_threshold, int8_activations, int8_gradient):
        ctx.save_for_backward(x, weight, codes, absmax)
        ctx.int8_gradient, ctx.bias_dtype = int8_gradient, None if bias is None else bias.dtype
        bias = None if bias is None else bias.to(x.dtype)
        return _ops.linear_8bit(x, codes, absmax, bias, outlier_threshold, int8_activations)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        x, weight, codes, absmax = ctx.saved_tensors
        x_grad = w_grad = b_grad = None
        if ctx.needs_input_grad[0]:
            if ctx.int8_gradient:
                # The sum runs over N: codes of the transposed weight, whose scales belong to the in features.
                columns, scales = _ops.quantize_int8(weight.detach().t())
                x_grad = _ops.linear_8bit(grad, columns, scales, None, 0.0, True)
            else:
                x_grad = _ops.linear_8bit_grad_input(grad, codes, absmax)
        rows = grad.reshape(-1, grad.shape[-1])
        if ctx.needs_input_grad[1]:
            w_grad = (rows.t() @ x.reshape(-1, x.shape[-1]).to(rows.dtype)).to(weight.dtype)
        if ctx.needs_input_grad[2]:
            b_grad = rows.sum(dim=0, dtype=torch.float32).to(ctx.bias_dtype)
        return x_grad, w_grad, b_grad, None, None, None, None, None


class _LinearGrad8bitFunction(torch.autograd.Function):
    """grad [..., N] -> grad W [..., K] through the dequantized int8 weight."""

    @staticmethod
    def forward(ctx, grad, weight, absmax):
        ctx.save_for_backward(weight, absmax)
        return _ops.linear_8bit_grad_input(grad, weight, absmax)

    @staticmethod
    def backward(ctx, grad):
        weight, absmax = ctx.saved_tensors
        w = _ops.dequantize_int8(weight, absmax, grad.dtype)
        return torch.nn.functional.linear(grad, w), None, None


def _expert_bias_grad(grad: Tensor, offsets: Tensor) -> Tensor:
    """Sums of `grad [S, N]` over each expert's rows, `[E, N]`: as a product, so that their order is fixed."""
    row = torch.arange(grad.shape[0], device=grad.device)
    begins = torch.nn.functional.pad(offsets[:-1], (1, 0))
    member = (row >= begins[:, None]) & (row < offsets[:, None])  # [E, S]
    return member.to(grad.dtype) @ grad


class Experts4bitFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, offsets, weight, absmax, nested_absmax, nested_offset, bias, codebook, block_size, n):
        ctx.save_for_backward(offsets, weight, absmax, nested_absmax, nested_offset)
        ctx.codebook, ctx.block_size, ctx.k = codebook, block_size, x.shape[1]
        scales = (absmax, nested_absmax, nested_offset)
        return _ops.experts_4bit(x, offsets, weight, *scales, bias, codebook, block_size, n)

    @staticmethod
    def backward(ctx, grad):
        x_grad = bias_grad = None
        if ctx.needs_input_grad[0]:
            x_grad = _ExpertsGrad4bitFunction.apply(grad, *ctx.saved_tensors, ctx.codebook, ctx.block_size, ctx.k)
        if ctx.needs_input_grad[6]:
            bias_grad = _expert_bias_grad(grad, ctx.saved_tensors[0])
        return x_grad, None, None, None, None, None, bias_grad, None, None, None


class _ExpertsGrad4bitFunction(torch.autograd.Function):
    """grad [S, N] -> grad W[e] [S, K]; differentiable again."""

    @staticmethod
    def forward(ctx, grad, offsets, weight, absmax, nested_absmax, nested_offset, codebook, block_size, k):
        ctx.save_for_backward(offsets, weight, absmax, nested_absmax, nested_offset)
        ctx.codebook, ctx.block_size, ctx.n = codebook, block_size, grad.shape[1]
        scales = (absmax, nested_absmax, nested_offset)
        return _ops.experts_4bit_grad_input(grad, offsets, weight, *scales, codebook, block_size, k)

    @staticmethod
    def backward(ctx, grad):
        out = Experts4bitFunction.apply(grad, *ctx.saved_tensors, None, ctx.codebook, ctx.block_size, ctx.n)
        return out, None, None, None, None, None, None, None, None


class Experts8bitFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, offsets, weight, absmax, bias):
        ctx.save_for_backward(offsets, weight, absmax)
        return _ops.experts_8bit(x, offsets, weight, absmax, bias)

    @staticmethod
    def backward(ctx, grad):
        x_grad = _ExpertsGrad8bitFunction.apply(grad, *ctx.saved_tensors) if ctx.needs_input_grad[0] else None
        bias_grad = _expert_bias_grad(grad, ctx.saved_tensors[0]) if ctx.needs_input_grad[4] else None
        return x_grad, None, None, None, bias_grad


class _ExpertsGrad8bitFunction(torch.autograd.Function):
    """grad [S, N] -> grad W[e] [S, K]; differentiable again."""

    @staticmethod
    def forward(ctx, grad, offsets, weight, absmax):
        ctx.save_for_backward(offsets, weight, absmax)
        return _ops.experts_8bit_grad_input(grad, offsets, weight, absmax)

    @staticmethod
    def backward(ctx, grad):
        return Experts8bitFunction.apply(grad, *ctx.saved_tensors, None), None, None, None
