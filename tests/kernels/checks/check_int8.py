"""The int8 Triton kernels: bytes of the oracle, products against float64, LLM.int8() against its reference."""

from __future__ import annotations

import pytest
import torch

from kbit.formats import blocks
from kbit.kernels.triton.dequantize_int8 import dequantize_int8
from kbit.kernels.triton.linear_8bit import linear_8bit
from kbit.kernels.triton.linear_8bit_grad_input import linear_8bit_grad_input
from kbit.kernels.triton.llm_int8 import llm_int8
from kbit.kernels.triton.quantize_int8 import quantize_int8
from kbit.kernels.triton.tiles import Tile
from kbit.ops import choose, reference

TOLERANCE = {torch.float32: 1e-6, torch.float16: 8e-4, torch.bfloat16: 6e-3}
DTYPES = tuple(TOLERANCE)


def close(out, expected, dtype):
    assert out.dtype == dtype and out.shape == expected.shape and out.isfinite().all()
    error = ((out.cpu().double() - expected).norm() / expected.norm().clamp(min=1e-30)).item()
    assert error < TOLERANCE[dtype], error


def weight_of(n, k, device):
    """(codes, bits of the scales, exact weight in float64)"""
    codes, absmax = blocks.quantize_int8(torch.randn(n, k) * 0.05)
    exact = codes.double() * absmax.double()[:, None] / 127
    return codes.to(device), absmax.view(torch.int32).to(device), exact


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(5, 64), (3, 1), (7, 33), (2, 3, 130), (4, 5000), (2, 17000), (9,)], ids=str)
def test_bytes_equal_the_oracles(shape, dtype, device):
    x = torch.randn(shape)
    if len(shape) == 2:
        x[0] = 0.0
        x[1] *= 1e-38 if dtype != torch.float16 else 1e-7  # subnormal scales
        x[-1] = torch.arange(shape[1]) % 255 - 127.0  # codes as they are, and halves between them
        x[-1, ::3] += 0.5
    x = x.to(dtype)
    codes, absmax = blocks.quantize_int8(x)
    ours, scales = quantize_int8(x.to(device))
    assert torch.equal(ours.cpu(), codes) and torch.equal(scales.cpu(), absmax)
    for scale in (scales, scales.view(torch.int32)):
        out = dequantize_int8(ours, scale, dtype)
        assert torch.equal(out.cpu(), blocks.dequantize_int8(codes, absmax, dtype))


def test_codes_where_a_reciprocal_decides(device):
    """127 / absmax in one rounding gives other codes than torch's reciprocal times 127: some of these would differ."""
    x = torch.randn(64, 2048).clamp(-4, 4).half()
    codes, absmax = blocks.quantize_int8(x)
    once = (x.float() * (torch.tensor(127.0) / absmax[:, None])).round().to(torch.int8)
    assert not torch.equal(codes, once)
    assert torch.equal(quantize_int8(x.to(device))[0].cpu(), codes)


def test_strides_float64_empty_and_nan(device):
    x = torch.randn(6, 40, 3)[:, ::2].transpose(0, 2)
    for y in (x, x.double()):
        ours = quantize_int8(y.to(device))
        assert all(torch.equal(a.cpu(), b) for a, b in zip(ours, blocks.quantize_int8(y), strict=True))
    assert quantize_int8(torch.empty(0, 5, device=device))[0].shape == (0, 5)
    assert torch.equal(quantize_int8(torch.empty(3, 0, device=device))[1].cpu(), torch.zeros(3))
    x = torch.randn(3, 20)
    x[1, 7] = float("nan")
    scales = quantize_int8(x.to(device))[1].cpu()
    assert scales[1].isnan() and scales[[0, 2]].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("m, n, k", [(1, 70, 256), (1, 5, 33), (3, 70, 256), (17, 33, 100), (33, 20, 384), (2, 3, 1)])
def test_product_with_int8_weights(m, n, k, dtype, device):
    codes, scales, exact = weight_of(n, k, device)
    x, bias, grad = torch.randn(m, k).to(dtype), torch.randn(n).to(dtype), torch.randn(m, n).to(dtype)
    for left in (False, True):
        for split in (1, 2):
            tile = Tile(16, 32, 64, split, 4, 2, left)
            out = linear_8bit(x.to(device), codes, scales, bias.to(device), tile)
            close(out, x.double() @ exact.T + bias.double(), dtype)
    close(linear_8bit(x.to(device), codes, scales, None), x.double() @ exact.T, dtype)
    close(linear_8bit_grad_input(grad.to(device), codes, scales), grad.double() @ exact, dtype)


def activations(kind, m, k):
    x = torch.randn(m, k).clamp(-3, 3)
    if kind == "six":
        for column in torch.randperm(k)[:6].tolist():
            x[:, column] *= 20
        x[m // 2, 0] = -6.0
    elif kind == "many":
        x[:, torch.rand(k) < 0.4] *= 20
    elif kind == "all":
        x = x.sign() * (6 + x.abs())
    return x


def expected_llm_int8(x, codes, scales, threshold, bias):
    limit = choose.llm_int8_outliers("cuda", *x.shape)
    out = reference.llm_int8(x.float(), codes.cpu(), scales.cpu().view(torch.float32), threshold, limit).double()
    return out + bias.double()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_too_many_outlier_columns_leave_int8(dtype, device):
    codes, scales, exact = weight_of(33, 99, device)
    x = activations("many", 40, 99).to(dtype)
    close(llm_int8(x.to(device), codes, scales, None, 6.0, limit=20), x.double() @ exact.T, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["none", "six", "many", "all"])
@pytest.mark.parametrize("m, n, k", [(20, 24, 128), (5, 37, 99), (40, 9, 260)])
def test_llm_int8(m, n, k, kind, dtype, device):
    codes, scales, _ = weight_of(n, k, device)
    x, bias = activations(kind, m, k).to(dtype), torch.randn(n).to(dtype)
    tile = Tile(32, 32, 64, 1, 4, 2)
    for threshold in (6.0, 0.0, 2.5) if kind == "six" else (6.0,):
        out = llm_int8(
            x.to(device), codes, scales, bias.to(device), threshold, tile, choose.llm_int8_outliers("cuda", m, k)
        )
        close(out, expected_llm_int8(x, codes, scales, threshold, bias), dtype)


def test_llm_int8_long_rows_strides_and_shapes(device):
    codes, scales, _ = weight_of(6, 17000, device)
    x = activations("six", 3, 17000)
    out = llm_int8(x.to(device), codes, scales, None, 6.0)
    close(out, expected_llm_int8(x, codes, scales, 6.0, torch.zeros(6)), torch.float32)
    codes, scales, _ = weight_of(6, 40, device)
    base = activations("six", 24, 80).to(device)
    for x in (base[:, :40], base[:, ::2], base.view(2, 12, 80)[..., 40:].transpose(0, 1)):
        out = llm_int8(x, codes, scales, None, 6.0)
        flat = expected_llm_int8(x.cpu().reshape(-1, 40), codes, scales, 6.0, torch.zeros(6))
        close(out, flat.view(*x.shape[:-1], 6), torch.float32)
    assert llm_int8(base[:0, :40], codes, scales, None, 6.0).shape == (0, 6)


@pytest.mark.parametrize("threshold", [0.0, 6.0])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_infinity_come_out_where_the_reference_gives_them(threshold, bad, device):
    codes, scales, _ = weight_of(9, 48, device)
    x = activations("six", 20, 48)
    x[4, 30] = bad
    out = llm_int8(x.to(device), codes, scales, None, threshold).cpu()
    expected = reference.llm_int8(x, codes.cpu(), scales.cpu().view(torch.float32), threshold)
    others = [m for m in range(20) if m != 4]
    assert not out[4].isfinite().any() and not expected[4].isfinite().any()
    close(out[others], expected[others].double(), torch.float32)


def test_zero_rows_stay_zero(device):
    codes, scales, _ = weight_of(9, 48, device)
    x = torch.randn(20, 48)
    x[3] = 0
    assert (llm_int8(x.to(device), codes, scales, None, 6.0)[3] == 0).all()
