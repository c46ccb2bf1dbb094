"""The 4-bit products in Triton against float64 products with the oracle's weights."""

from __future__ import annotations

import pytest
import torch

from kbit.formats import blocks, double
from kbit.kernels.triton.linear_4bit import linear_4bit
from kbit.kernels.triton.linear_4bit_grad_input import linear_4bit_grad_input
from kbit.kernels.triton.tiles import Tile

# Relative error of the whole output against float64: the rounding of weights, of inputs and of the result.
TOLERANCE = {torch.float32: 1e-6, torch.float16: 6e-4, torch.bfloat16: 4e-3}
SHAPES = [  # M, N, K, block size: row layout, then flat layouts (K not a multiple of the block size, even and odd)
    (1, 1, 64, 64),
    (3, 70, 256, 64),
    (17, 33, 96, 32),
    (33, 20, 384, 128),
    (2, 5, 4096, 4096),
    (5, 19, 100, 64),
    (4, 13, 33, 32),
    (1, 3, 7, 4096),
]


def quantized(n, k, block_size, name, nested, device):
    """(packed, scales as operators take them, the oracle's weight in float64)."""
    weight = torch.randn(n, k) * 0.05
    packed, absmax = blocks.quantize_4bit(weight, name, block_size)
    parts = [absmax.view(torch.int32), None, None]
    if nested:
        parts = list(double.quantize_absmax(absmax))
        absmax = double.dequantize_absmax(*parts)
        parts[1:] = [t.view(torch.int32) for t in parts[1:]]
    exact = blocks.dequantize_4bit(packed, absmax, name, block_size, (n, k), torch.float32).double()
    if k % block_size == 0:
        packed = packed.view(n, k // 2)
    return packed.to(device), [t if t is None else t.to(device) for t in parts], exact


def close(out, expected, dtype):
    assert out.dtype == dtype and out.isfinite().all()
    error = ((out.cpu().double() - expected).norm() / expected.norm()).item()
    assert error < TOLERANCE[dtype], error


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name, nested", [("nf4", True), ("fp4", False)])
def test_product_and_gradient(shape, dtype, name, nested, device):
    m, n, k, block_size = shape
    packed, scales, exact = quantized(n, k, block_size, name, nested, device)
    x, bias, grad = torch.randn(m, k).to(dtype), torch.randn(n).to(dtype), torch.randn(m, n).to(dtype)
    out = linear_4bit(x.to(device), packed, *scales, bias.to(device), name, block_size, n)
    close(out, x.double() @ exact.T + bias.double(), dtype)
    out = linear_4bit_grad_input(grad.to(device), packed, *scales, name, block_size, k)
    close(out, grad.double() @ exact, dtype)


@pytest.mark.parametrize("split", [2, 3, 7])
@pytest.mark.parametrize("k, block_size", [(640, 64), (200, 128)])
def test_split_k(split, k, block_size, device):
    packed, scales, exact = quantized(40, k, block_size, "nf4", True, device)
    x, bias = torch.randn(5, k), torch.randn(40)
    tile = Tile(bm=16, bn=32, bk=64, split=split)
    for b in (bias, None):
        out = linear_4bit(
            x.to(device), packed, *scales, None if b is None else b.to(device), "nf4", block_size, 40, tile
        )
        close(out, x.double() @ exact.T + (0 if b is None else b.double()), torch.float32)


def test_leading_dimensions_and_strides(device):
    packed, scales, exact = quantized(24, 128, 64, "nf4", True, device)
    base = torch.randn(4, 3, 256).to(device)
    for x in (base[..., :128], base[..., ::2], base[:, :2, 128:].transpose(0, 1), base[0, 0, :128], base[:0, :, :128]):
        out = linear_4bit(x, packed, *scales, None, "nf4", 64, 24)
        assert out.shape == (*x.shape[:-1], 24)
        if x.numel():
            close(out, x.cpu().double() @ exact.T, torch.float32)
    grad = torch.randn(3, 48).to(device)[:, ::2]
    close(linear_4bit_grad_input(grad, packed, *scales, "nf4", 64, 128), grad.cpu().double() @ exact, torch.float32)


def test_empty_sums(device):
    packed, scales, _ = quantized(4, 0, 64, "nf4", False, device)
    x, bias = torch.ones(2, 0, device=device), torch.arange(4.0, device=device)
    assert torch.equal(linear_4bit(x, packed, *scales, bias, "nf4", 64, 4), bias.expand(2, 4))
    assert torch.equal(linear_4bit(x, packed, *scales, None, "nf4", 64, 4), torch.zeros(2, 4, device=device))


def test_infinite_input_stays_in_its_token(device):
    """Masked rows of a tile must not leak: an infinity in one token leaves the others finite."""
    packed, scales, _ = quantized(16, 128, 64, "nf4", True, device)
    x = torch.randn(3, 128)
    x[1, 5] = float("inf")
    out = linear_4bit(x.to(device), packed, *scales, None, "nf4", 64, 16).cpu()
    assert out[[0, 2]].isfinite().all() and not out[1].isfinite().any()
