"""Quantizing and decoding on the CPU equal the plain torch path to the bit, at every instruction set."""

from __future__ import annotations

import pytest
import torch

import kbit
from kbit.formats import blocks, double
from kbit.ops import reference
from tests.kernels.cpu_levels import level  # noqa: F401

pytestmark = pytest.mark.usefixtures("level")
ops = torch.ops.kbit
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
COUNTS = (0, 1, 2, 31, 64, 65, 255, 4096, 4097, 12_345)


def samples(count: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """Ordinary values, zeros and tiny ones, values on midpoints; one that begins in the middle of a vector."""
    torch.manual_seed(count)
    x = torch.randn(count + 1).to(dtype)[1:]
    tiny = torch.where(torch.rand(count) < 0.5, torch.zeros(count), torch.randn(count) * 1e-39).to(dtype)
    grid = (torch.randint(-255, 256, (count,)) / 256).to(dtype)
    return [x, tiny, grid, x * 1e-4]


def same(a, b) -> None:
    for one, other in zip(a, b, strict=True):
        assert one.dtype == other.dtype and one.shape == other.shape
        assert torch.equal(one, other)


@pytest.mark.parametrize("name", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_quantize_4bit(name, dtype):
    for count in COUNTS:
        for x in samples(count, dtype):
            for block_size in (32, 64, 4096):
                same(ops.quantize_4bit(x, name, block_size), blocks.quantize_4bit(x, name, block_size))
    midpoints = torch.cat([blocks.codebook(name, kind="midpoints"), torch.ones(1)]).repeat(8)
    for shift in (0.0, 1e-7, -1e-7):
        same(ops.quantize_4bit(midpoints + shift, name, 32), blocks.quantize_4bit(midpoints + shift, name, 32))


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_dynamic(signed, dtype):
    for count in COUNTS:
        for x in samples(count, dtype):
            x = x if signed else x.abs()
            for block_size in (64, 256, 2048):
                codes, absmax = ops.quantize_dynamic(x, signed, block_size)
                same((codes, absmax), blocks.quantize_dynamic(x, signed, block_size))
                for scales in (absmax, absmax.view(torch.int32)):
                    got = ops.dequantize_dynamic(codes, scales, signed, block_size, dtype)
                    same((got,), (blocks.dequantize_dynamic(codes, absmax, signed, block_size, dtype),))


def test_midpoints_of_the_dynamic_map():
    """Values next to the middle between two codes, under scales of every size."""
    for signed in (True, False):
        middle = blocks.codebook("dynamic8" if signed else "dynamic8-unsigned", kind="midpoints")
        for scale in (1.0, 3e-7, 5e20, 1e-36):
            near = torch.cat([torch.nextafter(middle, middle + s) for s in (-1.0, 1.0)] + [middle, torch.ones(3)])
            x = near * scale
            same(ops.quantize_dynamic(x, signed, 4096), blocks.quantize_dynamic(x, signed, 4096))


def test_double_quantization():
    for count in COUNTS:
        scales = torch.rand(count) + 0.1
        codes, nested, offset = ops.quantize_absmax(scales)
        same((codes, nested, offset), double.quantize_absmax(scales))
        bits = (nested.view(torch.int32), offset.view(torch.int32))
        for extra in ((nested, offset), bits):
            same((ops.dequantize_absmax(codes, *extra),), (double.dequantize_absmax(codes, nested, offset),))


@pytest.mark.parametrize("dtype", DTYPES)
def test_int8(dtype):
    for shape in ((0, 5), (5, 0), (1, 1), (3, 64), (7, 129), (2, 3, 4097), (33,)):
        for x in samples(torch.Size(shape).numel(), dtype):
            x = x.view(shape)
            codes, absmax = ops.quantize_int8(x)
            same((codes, absmax), blocks.quantize_int8(x))
            got = ops.dequantize_int8(codes, absmax.view(torch.int32), dtype)
            same((got,), (blocks.dequantize_int8(codes, absmax, dtype),))
            if codes.dim() > 1 and codes.numel():
                ids = torch.tensor([[0, codes.shape[0] - 1], [0, 0]])
                table, scales = codes.flatten(1), absmax.flatten(1)[:, 0] if absmax.dim() > 1 else absmax
                same(
                    (ops.embedding_8bit(ids, table, scales, dtype),),
                    (reference.embedding_8bit(ids, table, scales, dtype),),
                )


def test_not_contiguous():
    x = torch.randn(130, 64).t()
    same(ops.quantize_4bit(x, "nf4", 64), blocks.quantize_4bit(x, "nf4", 64))
    same(ops.quantize_dynamic(x, True, 256), blocks.quantize_dynamic(x, True, 256))
    same(ops.quantize_int8(x), blocks.quantize_int8(x))
    codes, absmax = blocks.quantize_int8(torch.randn(130, 64))
    same(
        (ops.dequantize_int8(codes[::2], absmax[::2], torch.float32),),
        (blocks.dequantize_int8(codes[::2], absmax[::2], torch.float32),),
    )
    with pytest.raises((ValueError, RuntimeError)):
        ops.dequantize_int8(codes, absmax[:3], torch.float32)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite_are_refused_where_they_are(bad):
    for name in ("nf4", "nf4-plain", "fp4", "int8", "dynamic8"):
        for dtype in DTYPES:
            x = torch.randn(9, 640).to(dtype)
            x[4, 600] = bad
            with pytest.raises(ValueError, match=r"tensor 'w' holds 1 values that are not finite .* at \[4, 600\]"):
                kbit.quantize(x, name, name="w")
    with pytest.raises(ValueError, match="infinity in fp32"):
        kbit.quantize(torch.full((4, 64), 1e300, dtype=torch.float64), "nf4")


def test_results_do_not_depend_on_threads():
    x = torch.randn(300_001)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results.append((*ops.quantize_4bit(x, "nf4", 64), *ops.quantize_dynamic(x, True, 256)))
    finally:
        torch.set_num_threads(threads)
    same(results[0], results[1])
    same(results[0], results[2])
