"""int8 products on the CPU, at every instruction set: against float64, and against the reference."""

from __future__ import annotations

import functools

import pytest
import torch

from kbit.formats import blocks
from kbit.ops import choose, reference
from tests.kernels.cpu_levels import level  # noqa: F401

pytestmark = pytest.mark.usefixtures("level")
linear_8bit = torch.ops.kbit.linear_8bit
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# A rounding of the result, and of what is summed in fp32.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2**-8, torch.float16: 2**-10}


def problem(m: int, n: int, k: int, dtype: torch.dtype, outliers: int = 0):
    torch.manual_seed(m * 1000 + n + k)
    codes, absmax = blocks.quantize_int8(torch.randn(n, k))
    x = torch.randn(m, k)
    x[:, torch.randperm(k)[:outliers]] *= 30
    return x.to(dtype), codes, absmax, torch.randn(n).to(dtype)


def exact(x, codes, absmax, bias):
    weight = codes.double() * (absmax.double() / 127)[:, None]
    return x.double() @ weight.t() + bias.double(), (x.double().abs() @ weight.t().abs())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape", [(1, 1, 1), (1, 33, 64), (2, 31, 65), (4, 64, 4097), (5, 100, 1000), (16, 35, 130), (40, 7, 70)]
)
def test_weight_only(shape, dtype):
    m, n, k = shape
    x, codes, absmax, bias = problem(m, n, k, dtype, outliers=min(2, k - 1))
    want, size = exact(x, codes, absmax, bias)
    for scales in (absmax, absmax.view(torch.int32)):
        got = linear_8bit(x, codes, scales, bias, 6.0, False)
        assert got.dtype == dtype and got.shape == want.shape
        slack = TOLERANCE[dtype] * want.abs() + 2e-6 * size + 1e-6
        if not linear_is_native() or m > 16:  # the weight itself is rounded to x's dtype
            slack = slack + TOLERANCE[dtype] * size
        elif m > 4 and dtype != torch.float32:  # x has 16 bits under the scale of its largest value
            slack = slack + 2**-11 * size
        assert ((got.double() - want).abs() <= slack).all()


def linear_is_native() -> bool:
    from kbit.ops import cpu

    return cpu.kernels("linear_8bit") is not None


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("outliers", [0, 3])
@pytest.mark.parametrize(
    "shape", [(1, 1, 1), (3, 33, 64), (12, 64, 65), (13, 31, 100), (30, 100, 1000), (70, 32, 4097), (15, 33, 1030)]
)
def test_llm_int8(shape, outliers, dtype):
    m, n, k = shape
    x, codes, absmax, bias = problem(m, n, k, dtype, outliers=min(outliers, k - 1))
    for threshold in (0.0, 6.0):
        got = linear_8bit(x, codes, absmax, bias, threshold, True)
        want = reference.linear_8bit(x.float(), codes, absmax, bias.float(), threshold, True)
        # The integer part is exact: what is left is fp32, and the rounding of the result.
        torch.testing.assert_close(got.float(), want, rtol=TOLERANCE[dtype], atol=2e-5 * want.abs().max().item())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("m", [3, 20, 100])
def test_too_many_outlier_columns(m, dtype):
    """Up to the limit the other columns are rounded to int8; with one more nothing is."""
    x, codes, absmax, bias = problem(m, 40, 1100, dtype)
    x = x.clamp(-5, 5)
    limit = choose.llm_int8_outliers("cpu", m, 1100)
    for count in (limit, limit + 1):
        x[m // 2, :count] = 7.0
        got = linear_8bit(x, codes, absmax, bias, 6.0, True).double()
        want, size = exact(x, codes, absmax, bias)
        close = (got - want).abs() <= TOLERANCE[dtype] * want.abs() + (
            2**-11 if dtype != torch.float32 else 3e-6
        ) * size
        assert close.all() == (count > limit)
        quantized = reference.linear_8bit(x.float(), codes, absmax, bias.float(), 6.0, True).double()
        assert ((got - quantized).norm() / quantized.norm()) < 2 * TOLERANCE[dtype] + 1e-4


def test_extreme_codes_and_scales():
    """Sums that come close to int32's limits, codes of -128, rows of zeros, tiny and huge activations."""
    k = 20_000
    codes = torch.full((5, k), 127, dtype=torch.int8)
    codes[1], codes[2], codes[3] = -127, -128, 0
    absmax = torch.tensor([1.0, 2.0, 3.0, 0.0, 1e-20])
    for m in (1, 3, 20):
        for size in (1.0, 1e-38, 1e30, 0.0):
            x = torch.full((m, k), size)
            x[:, ::3] *= -0.5
            want, _ = exact(x, codes, absmax, torch.zeros(5))
            for quantized in (False, True):
                got = linear_8bit(x, codes, absmax, None, 0.0, quantized).double()
                slack = (0.005 if quantized else 1e-4) * want.abs() + 1e-37
                assert ((got - want).abs() <= slack).all(), (m, size, quantized)


def test_values_that_are_not_finite_stay_visible():
    for m in (2, 20):
        for quantized in (False, True):
            x, codes, absmax, bias = problem(m, 40, 128, torch.float32)
            x[1, 5] = float("nan")
            got = linear_8bit(x, codes, absmax, bias, 6.0, quantized)
            assert got[1].isnan().all() and got[0].isfinite().all()
            x[1, 5] = float("inf")
            assert not linear_8bit(x, codes, absmax, bias, 6.0, quantized)[1].isfinite().any()


def test_layouts():
    x, codes, absmax, bias = problem(6, 40, 96, torch.float32)
    want = linear_8bit(x, codes, absmax, bias, 6.0)
    close = functools.partial(torch.testing.assert_close, rtol=1e-6, atol=1e-5)
    close(linear_8bit(x.t().contiguous().t(), codes, absmax, bias, 6.0), want)
    close(linear_8bit(x.view(2, 3, 96), codes, absmax, bias, 6.0), want.view(2, 3, 40))
    shifted = torch.empty(6 * 96 + 1)[1:].view(6, 96).copy_(x)
    odd = torch.empty(40 * 96 + 3, dtype=torch.int8)[3:].view(40, 96).copy_(codes)
    close(linear_8bit(shifted, odd, absmax, bias, 6.0), want)
    every = torch.randint(-127, 128, (80, 96), dtype=torch.int8)
    want = linear_8bit(x, every[::2].contiguous(), absmax, None, 6.0)
    close(linear_8bit(x, every[::2], absmax, None, 6.0), want)
    assert linear_8bit(x[:0], codes, absmax, bias, 6.0).shape == (0, 40)
    with pytest.raises(RuntimeError):
        linear_8bit(x[:, :95], codes, absmax, bias, 6.0)
    assert linear_8bit(x, codes[:0], absmax[:0], None, 6.0, True).shape == (6, 0)


def test_threads_give_the_same_bits():
    x, codes, absmax, bias = problem(30, 300, 512, torch.bfloat16, outliers=4)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results.append(
                [linear_8bit(x, codes, absmax, bias, 6.0, q) for q in (True,)]
                + [linear_8bit(x[:3], codes, absmax, bias, 6.0)]
            )
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", DTYPES)
def test_grad_input(dtype):
    _, codes, absmax, _ = problem(3, 40, 96, dtype)
    grad = torch.randn(3, 40).to(dtype)
    got = torch.ops.kbit.linear_8bit_grad_input(grad, codes, absmax)
    assert torch.equal(got, reference.linear_8bit_grad_input(grad, codes, absmax))


@pytest.mark.parametrize("dtype", DTYPES)
def test_experts(dtype):
    torch.manual_seed(0)
    codes, absmax = blocks.quantize_int8(torch.randn(3, 20, 70))
    x, bias, offsets = torch.randn(29, 70).to(dtype), torch.randn(3, 20).to(dtype), torch.tensor([4, 4, 26])
    got = torch.ops.kbit.experts_8bit(x, offsets, codes, absmax, bias)
    want = reference.experts_8bit(x.double(), offsets, codes, absmax, bias.double())
    atol = 4 * TOLERANCE[dtype] * want.abs().max().item()
    torch.testing.assert_close(got.double(), want, rtol=0, atol=atol)
    grad = torch.ops.kbit.experts_8bit_grad_input(got, offsets, codes, absmax)
    assert torch.equal(grad, reference.experts_8bit_grad_input(got, offsets, codes, absmax))


def test_scales_of_another_weight_are_refused():
    x, codes, absmax, bias = problem(2, 40, 96, torch.float32)
    with pytest.raises(RuntimeError):
        linear_8bit(x, codes, absmax[:39], bias, 6.0)
