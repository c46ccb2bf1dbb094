"""Row-wise int8 and the dynamic 8-bit maps."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kbit.formats import blocks
from kbit.formats.codebooks import codebook
from tests.formats.helpers import bitsandbytes, golden, one_thread, same
from tests.golden.make import int8_inputs, state_inputs

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@pytest.mark.parametrize("case", sorted(int8_inputs()))
def test_int8_golden(case):
    data = golden("eight_bit")
    x = data[f"int8/{case}/x"]
    assert same(x, int8_inputs()[case])
    codes, absmax = blocks.quantize_int8(x)
    assert same(codes, data[f"int8/{case}/codes"])
    assert same(absmax, data[f"int8/{case}/absmax"])
    assert same(blocks.dequantize_int8(codes, absmax, torch.float32), data[f"int8/{case}/values"])


def test_int8_live():
    functional = bitsandbytes()
    cases = {**int8_inputs(), "large": torch.randn(300, 1100).half(), "tiny": (torch.randn(5, 64) * 1e-6).half()}
    cases["largest"] = torch.tensor([[65504.0, -1.0, 300.0]]).half()
    cases["transposed"] = torch.randn(40, 30).half().t()
    with one_thread():
        for case, x in cases.items():
            theirs, scb, _ = functional.int8_vectorwise_quant(x.contiguous())
            codes, absmax = blocks.quantize_int8(x)
            assert same(codes, theirs), case
            assert same(absmax, scb), case
            values = blocks.dequantize_int8(codes, absmax, torch.float32)
            assert same(values, functional.int8_vectorwise_dequant(codes, scb)), case


@settings(deadline=None, max_examples=60)
@given(
    shape=st.lists(st.integers(0, 30), min_size=1, max_size=3),
    dtype=st.sampled_from(DTYPES),
    exponent=st.integers(-44, 30),
    seed=st.integers(0, 2**31),
)
def test_int8_properties(shape, dtype, exponent, seed):
    rng = torch.Generator().manual_seed(seed)
    x = (torch.randn(shape, generator=rng, dtype=torch.float64) * 10.0**exponent).to(dtype)
    x = x.masked_fill(~x.isfinite(), 1.0)
    codes, absmax = blocks.quantize_int8(x)
    assert codes.shape == x.shape and codes.dtype == torch.int8 and absmax.shape == x.shape[:-1]
    assert codes.is_contiguous() and absmax.is_contiguous()
    row = absmax.double()[..., None]
    if x.numel():
        assert torch.equal(absmax, x.float().abs().amax(-1))
    # Within half a step of 1/127, and a little for the fp32 rounding of the scale.
    ideal = torch.where(row > 0, x.double() / row * 127, 0)
    assert ((codes.double() - ideal).abs() <= 0.5 + 1e-4).all()
    if dtype == torch.float32 and -30 < exponent:
        decoded = blocks.dequantize_int8(codes, absmax, torch.float64)
        assert ((decoded - codes.double() * row / 127).abs() <= row * 3e-7).all()


def test_int8_zero_row_and_layout():
    x = torch.randn(6, 4)
    x[:, 1] = 0.0
    codes, absmax = blocks.quantize_int8(x.t())
    assert codes.is_contiguous() and absmax[1] == 0 and not codes[1].any()
    assert same(codes, blocks.quantize_int8(x.t().contiguous())[0])
    assert (blocks.dequantize_int8(codes, absmax, torch.bfloat16)[1] == 0).all()


def test_int8_half_codes_round_to_even():
    x = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5]])
    assert blocks.quantize_int8(x)[0].tolist() == [[127, 0, 2, 2, 0, -2, -2]]


def decoded_as_stored(absmax: Tensor, name: str, block_size: int, x: Tensor) -> Tensor:
    """fp32 `[n, 256]`: what each of the 256 codes would decode to, for every element."""
    scale = absmax.repeat_interleave(block_size)[: x.numel()]
    return codebook(name) * scale[:, None]


def assert_nearest(x: Tensor, codes: Tensor, absmax: Tensor, name: str, block_size: int) -> None:
    """Brute force over all 256 codes in float64; the two last bits of an fp32 distance are all that may be lost."""
    choices = decoded_as_stored(absmax, name, block_size, x).double()
    distance = (x.reshape(-1, 1).double() - choices).abs()
    ours = distance.gather(1, codes.reshape(-1, 1).long())[:, 0]
    assert (ours <= distance.min(dim=1).values * (1 + 2**-22)).all()


def dynamic_cases() -> dict[str, Tensor]:
    rng = torch.Generator().manual_seed(3)
    halfway = codebook("dynamic8", kind="midpoints")
    return {
        **state_inputs(),
        "normal": torch.randn(3, 701, generator=rng),
        "halfway": torch.cat([torch.ones(1), halfway, halfway.nextafter(halfway + 1), halfway.nextafter(halfway - 1)]),
        "tiny": torch.randn(300, generator=rng) * 1e-37,
        "denormal": torch.randn(300, generator=rng) * 1e-41,
        "huge": torch.randn(300, generator=rng).clamp(-3, 3) * 1e38,
        "bf16": torch.randn(2, 300, generator=rng).bfloat16(),
        "zeros": torch.zeros(513),
        "one": torch.tensor([3.0]),
        "strided": torch.randn(40, 30, generator=rng).t(),
    }


@pytest.mark.parametrize("block_size", [32, 64, 256, 2048])
@pytest.mark.parametrize("case", sorted(dynamic_cases()))
def test_dynamic_is_nearest(case, block_size):
    x = dynamic_cases()[case]
    for signed in (True, False):
        values = x if signed else x.abs()
        codes, absmax = blocks.quantize_dynamic(values, signed, block_size)
        assert codes.shape == x.shape and absmax.shape == (math.ceil(x.numel() / block_size),)
        name = "dynamic8" if signed else "dynamic8-unsigned"
        assert_nearest(values.float(), codes, absmax, name, block_size)
        expected = decoded_as_stored(absmax, name, block_size, x).gather(1, codes.reshape(-1, 1).long()).view(x.shape)
        assert same(blocks.dequantize_dynamic(codes, absmax, signed, block_size, torch.float32), expected)


@settings(deadline=None, max_examples=40)
@given(
    count=st.integers(0, 700),
    signed=st.booleans(),
    spread=st.floats(0, 8),
    exponent=st.integers(-30, 30),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**31),
)
def test_dynamic_is_nearest_on_random_data(count, signed, spread, exponent, dtype, seed):
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(count, generator=rng) * 10.0 ** (exponent - spread * torch.rand(count, generator=rng))
    x = (x if signed else x.abs()).to(dtype)
    x = x.masked_fill(~x.isfinite(), 1.0)
    codes, absmax = blocks.quantize_dynamic(x, signed, 256)
    if count:
        assert_nearest(x.float(), codes, absmax, "dynamic8" if signed else "dynamic8-unsigned", 256)


def test_dynamic_zero_stays_zero_and_the_maximum_exact():
    """What bitsandbytes' CPU table misses: 0 in a nonzero block becomes 2e-5 there."""
    for signed in (True, False):
        codes, absmax = blocks.quantize_dynamic(torch.tensor([0.0, 3.7, 1e-9, 0.0]), signed, 256)
        decoded = blocks.dequantize_dynamic(codes, absmax, signed, 256, torch.float32)
        assert decoded[0] == 0 and decoded[3] == 0 and decoded[1] == torch.tensor(3.7)


@pytest.mark.parametrize("case", ["signed", "unsigned"])
def test_dynamic_golden(case):
    """What bitsandbytes wrote decodes to its values; what we write is never further off."""
    data, signed = golden("eight_bit"), case == "signed"
    x, theirs = data[f"dynamic/{case}/x"], data[f"dynamic/{case}/codes"]
    assert same(x, state_inputs()[case])
    codes, absmax = blocks.quantize_dynamic(x, signed, 4096)
    assert same(absmax, data[f"dynamic/{case}/absmax"])
    assert same(blocks.dequantize_dynamic(theirs, absmax, signed, 4096, torch.float32), data[f"dynamic/{case}/values"])
    ours = blocks.dequantize_dynamic(codes, absmax, signed, 4096, torch.float32).double() - x.double()
    assert (ours.abs() <= (data[f"dynamic/{case}/values"].double() - x.double()).abs()).all()
    assert (ours.abs() < (data[f"dynamic/{case}/values"].double() - x.double()).abs()).any()


def test_dynamic_live():
    functional = bitsandbytes()
    with one_thread():
        for case, x in dynamic_cases().items():
            for signed in (True, False):
                values = (x if signed else x.abs()).contiguous().float()
                name = "dynamic8" if signed else "dynamic8-unsigned"
                theirs, state = functional.quantize_blockwise(values, code=codebook(name), blocksize=256)
                codes, absmax = blocks.quantize_dynamic(values, signed, 256)
                if case != "zeros":
                    assert same(absmax, state.absmax), case
                decoded = functional.dequantize_blockwise(theirs, state)
                assert same(blocks.dequantize_dynamic(theirs, state.absmax, signed, 256, torch.float32), decoded), case
                ours = blocks.dequantize_dynamic(codes, absmax, signed, 256, torch.float32)
                error, their_error = ((v.double() - values.double()).abs() for v in (ours, decoded))
                assert (error <= their_error * (1 + 2**-22)).all(), case
