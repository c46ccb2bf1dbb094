"""`torch.library.opcheck` for every raw operator: schema, fake implementation, tracing with dynamic shapes."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import pytest
import torch
from torch.library import opcheck

from kbit.ops.schemas import SCHEMAS
from tests.ops.helpers import FOUR_BIT, weight_4bit, weight_8bit

ops = torch.ops.kbit
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
X_SHAPES = [(3, 64), (64,), (2, 5, 64), (0, 64), (40, 64)]


def check(name: str, *args: object) -> None:
    opcheck(getattr(ops, name).default, args)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(4, 64), (7, 33), (1,), (0, 64), (2, 3, 40)])
def test_quantize(shape, dtype):
    x = torch.randn(shape).to(dtype)
    check("quantize_4bit", x, "nf4", 64)
    check("quantize_4bit", x, "fp4", 32)
    check("quantize_int8", x)
    check("quantize_dynamic", x, True, 256)
    check("quantize_dynamic", x.abs(), False, 64)


def test_quantize_strided():
    x = torch.randn(24, 64).t()
    for name, args in (("quantize_4bit", ("nf4", 64)), ("quantize_int8", ()), ("quantize_dynamic", (True, 64))):
        check(name, x, *args)
    check("quantize_int8", torch.randn(4, 3, 8).permute(2, 0, 1))


def test_absmax():
    for count in (0, 1, 256, 700):
        check("quantize_absmax", torch.rand(count))
    codes, nested, offset = ops.quantize_absmax(torch.rand(600))
    check("dequantize_absmax", codes.view(3, 200), nested, offset)
    check("dequantize_absmax", codes, nested.view(torch.int32), offset.view(torch.int32))


@pytest.mark.parametrize("label", FOUR_BIT)
def test_dequantize(label):
    for n, k in ((4, 128), (5, 33), (0, 64)):
        for bits in (True, False):
            parts, _ = weight_4bit(n, k, label, bits=bits)
            check("dequantize_4bit", *parts, label[:3], 64, [n, k], torch.bfloat16 if bits else torch.float32)


def test_dequantize_8bit():
    for bits in (True, False):
        parts, _ = weight_8bit(5, 33, bits)
        check("dequantize_int8", *parts, torch.bfloat16)
    codes, absmax = ops.quantize_dynamic(torch.randn(3, 300), True, 256)
    check("dequantize_dynamic", codes, absmax, True, 256, torch.float32)
    check("dequantize_dynamic", codes, absmax.view(torch.int32), True, 256, torch.float16)


@pytest.mark.parametrize("label", ["nf4", "fp4-plain"])
@pytest.mark.parametrize("shape", X_SHAPES)
def test_linear_4bit(label, shape):
    parts, _ = weight_4bit(8, 64, label)
    for dtype, bias in zip(DTYPES, (None, torch.randn(8).half(), None), strict=True):
        check("linear_4bit", torch.randn(shape).to(dtype), *parts, bias, label[:3], 64, 8)
    grad = torch.randn(*shape[:-1], 8)
    check("linear_4bit_grad_input", grad, *parts, label[:3], 64, 64)


def test_linear_4bit_odd_and_strided():
    parts, _ = weight_4bit(7, 33)
    check("linear_4bit", torch.randn(3, 33), *parts, torch.randn(7), "nf4", 64, 7)
    check("linear_4bit", torch.randn(33, 6).t(), *parts, None, "nf4", 64, 7)
    check("linear_4bit", torch.randn(4, 2, 33).transpose(0, 1), *parts, None, "nf4", 64, 7)
    check("linear_4bit_grad_input", torch.randn(1, 1).expand(3, 7), *parts, "nf4", 64, 33)


@pytest.mark.parametrize("label", ["nf4", "fp4-plain"])
@pytest.mark.parametrize("shape", X_SHAPES)
def test_linear_4bit_group(label, shape):
    weights = [weight_4bit(n, 64, label)[0] for n in (8, 5)]
    columns = [list(column) for column in zip(*weights, strict=True)]
    for dtype in (torch.float32, torch.bfloat16):
        biases = [None, torch.randn(5).to(dtype)]
        check("linear_4bit_group", torch.randn(shape).to(dtype), *columns, biases, label[:3], 64, [8, 5])


@pytest.mark.parametrize("shape", X_SHAPES)
def test_linear_8bit(shape):
    parts, _ = weight_8bit(8, 64)
    for dtype, bias in zip(DTYPES, (None, torch.randn(8).half(), None), strict=True):
        x = torch.randn(shape).to(dtype)
        check("linear_8bit", x, *parts, bias, 0.0 if dtype == torch.float16 else 2.0)
    check("linear_8bit_grad_input", torch.randn(*shape[:-1], 8), *parts)


@pytest.mark.parametrize("shape", X_SHAPES)
def test_linear_8bit_group(shape):
    weights = [weight_8bit(n, 64)[0] for n in (8, 5)]
    columns = [list(column) for column in zip(*weights, strict=True)]
    for dtype, activations in ((torch.float32, None), (torch.bfloat16, True)):
        biases = [None, torch.randn(5).to(dtype)]
        check("linear_8bit_group", torch.randn(shape).to(dtype), *columns, biases, 2.0, activations)


def test_linear_8bit_strided():
    parts, _ = weight_8bit(7, 33)
    check("linear_8bit", torch.randn(33, 20).t(), *parts, None, 6.0)
    check("linear_8bit", torch.randn(20, 2, 33).transpose(0, 1), *parts, None, 6.0)


@pytest.mark.parametrize("ends", [(1, 1, 4), (0, 0, 0), (5, 5, 5)])
def test_experts(ends):
    offsets = torch.tensor(ends, dtype=torch.int32)
    for (n, k), label in itertools.product([(8, 64), (7, 33)], ["nf4", "fp4-plain"]):
        parts, _ = weight_4bit(3 * n, k, label)
        for dtype, bias in zip(DTYPES, (None, torch.randn(3, n).half(), None), strict=True):
            check("experts_4bit", torch.randn(5, k).to(dtype), offsets, *parts, bias, label[:3], 64, n)
        check("experts_4bit_grad_input", torch.randn(5, n), offsets, *parts, label[:3], 64, k)
    parts, _ = weight_8bit(21, 33)
    codes, absmax = parts[0].view(3, 7, 33), parts[1].view(3, 7)
    check("experts_8bit", torch.randn(33, 5).t(), offsets, codes, absmax, torch.randn(3, 7))
    check("experts_8bit_grad_input", torch.randn(5, 7).bfloat16(), offsets, codes, absmax)


@pytest.mark.parametrize("ids", [torch.tensor([0, 3, 3]), torch.tensor(2), torch.zeros(2, 0, dtype=torch.long)])
def test_embeddings(ids):
    for label in FOUR_BIT:
        for dim in (64, 33):
            parts, _ = weight_4bit(5, dim, label)
            check("embedding_4bit", ids, *parts, label[:3], 64, dim, torch.bfloat16)
    parts, _ = weight_8bit(5, 33)
    check("embedding_8bit", ids.int(), *parts, torch.float16)


def test_every_operator_is_checked():
    """Read off this file, since its tests may run in several processes."""
    called = re.findall(r'\bcheck\(\s*"(\w+)"', Path(__file__).read_text())
    assert set(called) == set(SCHEMAS)


def test_meta_tensors():
    parts, _ = weight_4bit(8, 64)
    meta = [None if t is None else t.to("meta") for t in parts]
    x = torch.empty(2, 3, 64, device="meta", dtype=torch.bfloat16)
    out = ops.linear_4bit(x, *meta, None, "nf4", 64, 8)
    assert out.shape == (2, 3, 8) and out.dtype == torch.bfloat16 and out.is_meta
    assert ops.linear_4bit_grad_input(out, *meta, "nf4", 64, 64).shape == x.shape
    codes, absmax = (t.to("meta") for t in weight_8bit(8, 64)[0])
    assert ops.linear_8bit(x, codes, absmax, None, 6.0).shape == (2, 3, 8)
    ids = torch.empty(4, 2, device="meta", dtype=torch.long)
    assert ops.embedding_4bit(ids, *meta, "nf4", 64, 64, torch.float16).shape == (4, 2, 64)
    assert ops.embedding_8bit(ids, codes, absmax, torch.float16).shape == (4, 2, 64)
