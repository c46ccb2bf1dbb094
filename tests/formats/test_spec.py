"""`Format`, layouts and packing: sizes, names, JSON."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import kbit
from kbit.formats import BLOCK_SIZES, FORMAT_NAMES, Format
from kbit.formats.packing import layout_shapes, pack_nibbles, unpack_nibbles

shapes = st.lists(st.integers(0, 70), min_size=0, max_size=3)


@st.composite
def formats(draw):
    name = draw(st.sampled_from(FORMAT_NAMES))
    if name == "int8":
        return Format("int8", 0)
    return Format(name, draw(st.sampled_from(BLOCK_SIZES)), name in ("nf4", "fp4") and draw(st.booleans()))


@settings(deadline=None, max_examples=120)
@given(fmt=formats(), shape=shapes)
def test_nbytes_is_what_a_tensor_takes(fmt, shape):
    if fmt.name == "int8" and not shape:
        return
    x = torch.rand(shape)
    q = kbit.quantize(x, fmt)
    assert q.nbytes == fmt.nbytes(shape) == fmt.nbytes(tuple(shape))
    assert q.codes.shape == layout_shapes(fmt, shape)[0] and q.absmax.shape == layout_shapes(fmt, shape)[1]
    assert q.absmax.numel() == fmt.block_count(shape)
    count = math.prod(shape)
    assert fmt.bits_per_weight(shape) == (8 * q.nbytes / count if count else 0)


@settings(deadline=None, max_examples=40)
@given(fmt=formats())
def test_json_round_trip(fmt):
    assert Format.from_json(json.loads(json.dumps(fmt.to_json()))) == fmt
    assert hash(Format.from_json(fmt.to_json())) == hash(fmt)


def test_bits_of_the_usual_formats():
    shape = (4096, 4096)
    assert Format.parse("nf4-plain").bits_per_weight(shape) == 4.5
    assert Format.parse("nf4").bits_per_weight(shape) == pytest.approx(4.127, abs=5e-4)
    assert Format.parse("int8").bits_per_weight(shape) == pytest.approx(8.008, abs=1e-3)


@pytest.mark.parametrize("label", ["nf4", "fp4", "nf4-plain", "fp4-plain", "int8", "dynamic8", "dynamic8-unsigned"])
def test_parse_inverts_label(label):
    assert Format.parse(label).label == label
    assert Format.parse(label).bits == (4 if "f" in label[:2] else 8)


def test_parse_options():
    assert Format.parse("nf4") == Format("nf4", 64, True)
    assert Format.parse("fp4", block_size=128, double_quant=False) == Format("fp4", 128, False)
    assert Format.parse("nf4-plain", double_quant=True) == Format("nf4", 64, True)
    assert Format.parse("dynamic8") == Format("dynamic8", 256)
    assert Format() == Format("nf4", 64, False)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("nf5",), "unknown format 'nf5'; known: nf4"),
        (("nf4", 48), "block_size must be one of 32, 64"),
        (("nf4", 64.0), "block_size must be one of"),
        (("nf4", True), "block_size must be one of"),
        (("nf4", "64"), "got '64'"),
        (("int8", 64), "int8 has one scale a row: block_size must be 0, got 64"),
        (("dynamic8", 256, True), "double quantization exists for nf4 and fp4 only"),
        (("nf4", 64, 1), "double_quant must be True or False, got 1"),
    ],
)
def test_what_does_not_exist_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Format(*arguments)


@pytest.mark.parametrize("data", [[], "nf4", {"name": "nf4", "size": 3}, {"name": "nf4", "block_size": None}, {1: 2}])
def test_untrusted_json(data):
    with pytest.raises(ValueError):
        Format.from_json(data)


def test_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Format().name = "fp4"  # type: ignore[misc]


def test_layouts():
    nf4 = Format("nf4", 64)
    assert layout_shapes(nf4, (8, 128)) == ((8, 64), (8, 2))
    assert layout_shapes(nf4, (2, 8, 128)) == ((2, 8, 64), (2, 8, 2))
    assert layout_shapes(nf4, (8, 100)) == ((400,), (13,))  # 100 columns: blocks cross rows
    assert layout_shapes(nf4, (3, 33)) == ((50,), (2,))
    assert layout_shapes(nf4, ()) == ((1,), (1,))
    assert layout_shapes(Format("int8", 0), (8, 100)) == ((8, 100), (8,))
    assert layout_shapes(Format("dynamic8", 256), (2, 512)) == ((2, 512), (2, 2))


@settings(deadline=None, max_examples=60)
@given(codes=st.lists(st.integers(0, 15), max_size=50), pad=st.integers(0, 15))
def test_packing(codes, pad):
    packed = pack_nibbles(torch.tensor(codes, dtype=torch.uint8), pad)
    expected = codes + [pad] * (len(codes) % 2)
    assert packed.tolist() == [16 * a + b for a, b in zip(expected[::2], expected[1::2], strict=True)]
    assert unpack_nibbles(packed, len(codes)).tolist() == codes
