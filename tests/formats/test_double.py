"""Double quantization of block scales."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kbit.formats import blocks
from kbit.formats.codebooks import codebook
from kbit.formats.double import dequantize_absmax, quantize_absmax
from tests.formats.helpers import bitsandbytes, golden, one_thread, same
from tests.golden.make import scale_inputs


@pytest.mark.parametrize("case", sorted(scale_inputs()))
def test_golden(case):
    """Its codes decode to its scales; ours are at least as close; offset and nested scales are the same bits."""
    data = {key.rpartition("/")[2]: t for key, t in golden("eight_bit").items() if key.startswith(f"double/{case}/")}
    assert same(data["x"], scale_inputs()[case])
    with one_thread():
        codes, nested, offset = quantize_absmax(data["x"])
    assert same(nested, data["nested_absmax"]) and same(offset, data["nested_offset"])
    assert same(dequantize_absmax(data["codes"], data["nested_absmax"], data["nested_offset"]), data["values"])
    error = (dequantize_absmax(codes, nested, offset).double() - data["x"].double()).abs()
    assert error.sum() <= (data["values"].double() - data["x"].double()).abs().sum()


@pytest.mark.parametrize("name", ["nf4", "fp4"])
@pytest.mark.parametrize("shape", [(64, 256), (300, 512), (7, 33), (1,), (1024, 4160)])
def test_live(name, shape):
    functional = bitsandbytes()
    x = torch.randn(shape) * (torch.rand(shape[0], *[1] * (len(shape) - 1)) + 0.05)
    with one_thread():
        packed, state = functional.quantize_4bit(x, compress_statistics=True, quant_type=name)
        ours_packed, absmax = blocks.quantize_4bit(x, name, 64)
        codes, nested, offset = quantize_absmax(absmax)
        theirs = functional.dequantize_blockwise(state.absmax, state.state2) + state.offset
    assert same(ours_packed, packed.view(-1))
    assert same(nested, state.state2.absmax) and same(offset[0], state.offset)
    assert same(dequantize_absmax(state.absmax, state.state2.absmax, state.offset.view(1)), theirs)
    ours = dequantize_absmax(codes, nested, offset)
    residual = (absmax - offset).double()  # what is stored: nearest here, so never further off
    step = (ours - offset).double(), (theirs - offset).double()
    slack = 1e-6 * absmax.abs().max()
    assert ((step[0] - residual).abs() <= (step[1] - residual).abs() + slack).all()
    assert (ours.double() - absmax.double()).abs().sum() <= (theirs.double() - absmax.double()).abs().sum() + slack


@settings(deadline=None, max_examples=40)
@given(count=st.integers(1, 1500), exponent=st.integers(-30, 30), seed=st.integers(0, 2**31))
def test_two_roundings_and_the_nearest_code(count, exponent, seed):
    absmax = torch.rand(count, generator=torch.Generator().manual_seed(seed)) * 10.0**exponent
    codes, nested, offset = quantize_absmax(absmax)
    assert codes.shape == (count,) and nested.shape == (-(-count // 256),) and offset.shape == (1,)
    scale = nested.repeat_interleave(256)[:count]
    product = codebook("dynamic8")[codes.long()] * scale
    assert same(dequantize_absmax(codes, nested, offset), product + offset)
    # The largest step of the signed map is 1/64 of the nested scale.
    error = (dequantize_absmax(codes, nested, offset) - absmax).abs()
    assert (error <= scale * (1 / 128 + 1e-5) + 1e-6 * absmax.abs().max()).all()


def test_empty():
    codes, nested, offset = quantize_absmax(torch.empty(0))
    assert codes.numel() == nested.numel() == 0 and offset.tolist() == [0.0]
    assert dequantize_absmax(codes, nested, offset).shape == (0,)


def test_shape_of_codes_is_kept_when_decoding():
    codes, nested, offset = quantize_absmax(torch.rand(6 * 50))
    flat = dequantize_absmax(codes, nested, offset)
    assert same(dequantize_absmax(codes.view(6, 50), nested, offset), flat.view(6, 50))


def test_scales_near_the_end_of_fp32():
    """Their sum overflows, their mean must not."""
    absmax = torch.full((600,), 3e38)
    absmax[::2] = 2.5e38
    decoded = dequantize_absmax(*quantize_absmax(absmax))
    assert decoded.isfinite().all() and (decoded / absmax - 1).abs().max() < 0.01
