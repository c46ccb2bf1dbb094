"""Quantize and dequantize in Triton: the bytes of the oracle, whatever the shape."""

from __future__ import annotations

import pytest
import torch

from kbit.formats import blocks, double
from kbit.kernels.triton.dequantize_4bit import dequantize_4bit
from kbit.kernels.triton.quantize_4bit import bins, quantize_4bit

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
COUNTS = (1, 2, 31, 64, 4095, 4097, 9001)


def data(count: int, dtype: torch.dtype) -> torch.Tensor:
    """Weights with what breaks quantizers: zeros of both signs, a block of zeros, huge and tiny blocks."""
    x = torch.randn(count, dtype=torch.float32)
    x[::7] = 0.0
    x[3::11] = -0.0
    x[64:128] = 0.0
    x[128:192] *= 1e4
    x[192:256] *= 1e-39 if dtype != torch.float16 else 1e-7
    return x.to(dtype)


@pytest.mark.parametrize("name", ["nf4", "fp4"])
@pytest.mark.parametrize("block_size", [32, 64, 128, 512, 4096])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bytes_equal_the_oracles(name, block_size, dtype, device):
    for count in COUNTS:
        x = data(count, dtype)
        packed, absmax = blocks.quantize_4bit(x, name, block_size)
        ours, our_absmax = quantize_4bit(x.to(device), name, block_size)
        assert torch.equal(ours.cpu(), packed), count
        assert torch.equal(our_absmax.cpu(), absmax), count
        plain = dequantize_4bit(ours, our_absmax, None, None, name, block_size, (count,), dtype)
        assert torch.equal(plain.cpu(), blocks.dequantize_4bit(packed, absmax, name, block_size, (count,), dtype))
        nested = double.quantize_absmax(absmax)
        decoded = double.dequantize_absmax(*nested)
        expected = blocks.dequantize_4bit(packed, decoded, name, block_size, (count,), dtype)
        codes, nested_absmax, offset = (t.to(device) for t in nested)
        for as_bits in (False, True):  # modules hold fp32 scales as the bits of int32
            scales = [t.view(torch.int32) if as_bits else t for t in (nested_absmax, offset)]
            got = dequantize_4bit(ours, codes, *scales, name, block_size, (count,), dtype)
            assert torch.equal(got.cpu(), expected), count


@pytest.mark.parametrize("name", ["nf4", "fp4"])
def test_values_on_and_beside_every_midpoint(name, device):
    from kbit.formats.codebooks import codebook

    middle = codebook(name, kind="midpoints")
    beside = [middle, middle.nextafter(torch.tensor(2.0)), middle.nextafter(torch.tensor(-2.0)), codebook(name)]
    grid = torch.arange(-16, 17) / 16
    x = torch.cat([*beside, grid, grid.nextafter(torch.tensor(2.0)).clamp(-1, 1), torch.tensor([1.0, -1.0])])
    x = torch.nn.functional.pad(x, (0, -len(x) % 64 + 64))
    x[63::64] = 1.0  # every block has absmax 1, so that values arrive unscaled
    for count in (len(x), len(x) - 1):
        expected = blocks.quantize_4bit(x[:count], name, 64)
        ours = quantize_4bit(x[:count].to(device), name, 64)
        assert torch.equal(ours[0].cpu(), expected[0]) and torch.equal(ours[1].cpu(), expected[1])
    assert len(bins(name)[0]) == 33


def test_any_shape_and_strides(device):
    x = torch.randn(6, 40, 3)[:, ::2].transpose(0, 2)  # 3 x 20 x 6, not contiguous
    packed, absmax = blocks.quantize_4bit(x, "nf4", 64)
    ours = quantize_4bit(x.to(device), "nf4", 64)
    assert torch.equal(ours[0].cpu(), packed) and torch.equal(ours[1].cpu(), absmax)
    out = dequantize_4bit(ours[0].view(2, -1), ours[1].view(-1, 1), None, None, "nf4", 64, x.shape, torch.float32)
    assert torch.equal(out.cpu(), blocks.dequantize_4bit(packed, absmax, "nf4", 64, x.shape, torch.float32))
    assert torch.equal(quantize_4bit(x.double().to(device), "nf4", 64)[0].cpu(), packed)


def test_empty(device):
    packed, absmax = quantize_4bit(torch.empty(0, 5, device=device), "nf4", 64)
    assert packed.shape == (0,) and absmax.shape == (0,)
    assert dequantize_4bit(packed, absmax, None, None, "nf4", 64, (0, 5), torch.bfloat16).shape == (0, 5)
