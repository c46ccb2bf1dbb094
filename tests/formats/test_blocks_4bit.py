"""NF4 and FP4 against golden files, a live bitsandbytes, and a slow decoder that shares no code."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kbit.formats import blocks
from kbit.formats.codebooks import codebook
from tests.formats.helpers import bitsandbytes, decode_slowly, golden, one_thread, same
from tests.golden.make import BLOCK_SIZES, inputs

INPUTS = inputs()
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
GOLDEN_KEYS = sorted(key.removesuffix("/codes") for key in golden("four_bit") if key.endswith("/codes"))


def test_golden_inputs_are_those_of_the_script():
    for name, x in INPUTS.items():
        assert same(golden("four_bit")[f"{name}/x"], x), name


@pytest.mark.parametrize("key", GOLDEN_KEYS)
def test_golden(key):
    data = golden("four_bit")
    case, name, block_size = key.split("/")
    x = data[f"{case}/x"]
    packed, absmax = blocks.quantize_4bit(x, name, int(block_size))
    assert same(packed, data[f"{key}/codes"])
    assert same(absmax, data[f"{key}/absmax"])
    if f"{key}/values" in data:
        values = blocks.dequantize_4bit(packed, absmax, name, int(block_size), x.shape, x.dtype)
        assert same(values, data[f"{key}/values"])


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@pytest.mark.parametrize("name", ["nf4", "fp4"])
def test_live(name, block_size):
    functional = bitsandbytes()
    big = torch.randn(2**18 // 1000 + 3, 1000)  # beyond one chunk, with a short last block
    cases = {**INPUTS, "big": big, "big-bf16": big.bfloat16(), "scalar": torch.tensor(0.7)[None]}
    cases |= {f"transposed-{dtype}": torch.randn(70, 96).to(dtype).t() for dtype in DTYPES}
    cases["strided"] = torch.randn(64, 256)[::2, ::3]
    with one_thread():
        for case, x in cases.items():
            theirs, state = functional.quantize_4bit(x.contiguous(), blocksize=block_size, quant_type=name)
            packed, absmax = blocks.quantize_4bit(x, name, block_size)
            assert same(packed, theirs.view(-1)), case
            assert same(absmax, state.absmax), case
            # Its CPU decoder reads wrong scales where a row is shorter than a block: there it is no reference.
            if x.dim() == 2 and x.numel() and (x.shape[1] % block_size == 0 or x.shape[1] % 2):
                ours = blocks.dequantize_4bit(packed, absmax, name, block_size, x.shape, x.dtype)
                assert torch.equal(ours, functional.dequantize_4bit(theirs, state)), case


@pytest.mark.parametrize("name", ["nf4", "fp4"])
@pytest.mark.parametrize("case", sorted(INPUTS))
def test_decode_against_python(name, case):
    x = INPUTS[case]
    if x.numel() > 1500:
        x = x.reshape(-1)[:1501]
    packed, absmax = blocks.quantize_4bit(x, name, 64)
    expected = decode_slowly(packed, absmax, name, 64, tuple(x.shape))
    for dtype in DTYPES:
        assert same(blocks.dequantize_4bit(packed, absmax, name, 64, x.shape, dtype), expected.to(dtype))


@settings(deadline=None, max_examples=60)
@given(
    shape=st.lists(st.integers(0, 40), min_size=0, max_size=3),
    name=st.sampled_from(["nf4", "fp4"]),
    block_size=st.sampled_from(BLOCK_SIZES),
    dtype=st.sampled_from(DTYPES),
    exponent=st.integers(-42, 4),
    seed=st.integers(0, 2**31),
)
def test_properties(shape, name, block_size, dtype, exponent, seed):
    """Sizes, finite values, and no element further from its value than half a step of the table."""
    rng = torch.Generator().manual_seed(seed)
    x = (torch.randn(shape, generator=rng, dtype=torch.float64) * 10.0**exponent).to(dtype)
    packed, absmax = blocks.quantize_4bit(x, name, block_size)
    count = math.prod(shape)
    assert packed.shape == ((count + 1) // 2,) and absmax.shape == (math.ceil(count / block_size),)
    decoded = blocks.dequantize_4bit(packed, absmax, name, block_size, x.shape, torch.float32)
    assert decoded.shape == x.shape and decoded.isfinite().all()
    scale = absmax.double().repeat_interleave(block_size)[:count].view(x.shape)
    values = codebook(name).double().sort().values
    error = (decoded.double() - x.double()).abs()
    half_step = values.diff().max() / 2
    assert (error <= scale * (half_step + 1e-6) + 1e-38).all()
    # Quantizing what was decoded changes nothing.
    again = blocks.quantize_4bit(decoded, name, block_size)
    if exponent > -30:
        assert torch.equal(again[1], absmax)
        assert torch.equal(blocks.dequantize_4bit(*again, name, block_size, x.shape, torch.float32), decoded)


@settings(deadline=None, max_examples=40)
@given(name=st.sampled_from(["nf4", "fp4"]), seed=st.integers(0, 2**31), dtype=st.sampled_from(DTYPES))
def test_codes_are_nearest(name, seed, dtype):
    """Brute force over the 16 values in float64: nothing is nearer by more than the rounding of one fp32 step."""
    x = torch.randn(4, 64, generator=torch.Generator().manual_seed(seed)).to(dtype)
    packed, absmax = blocks.quantize_4bit(x, name, 64)
    decoded = blocks.dequantize_4bit(packed, absmax, name, 64, x.shape, torch.float32)
    choices = codebook(name).double() * absmax.double().view(4, 1, 1)
    best = (x.double()[..., None] - choices).abs().min(dim=-1).values
    assert ((decoded.double() - x.double()).abs() <= best + 1e-6 * absmax.double()[:, None]).all()


@pytest.mark.parametrize("name", ["nf4", "fp4"])
def test_ties_go_to_the_lower_value(name):
    """On a midpoint the lower neighbour, one step above it the upper one; absmax 1, so nothing is scaled."""
    order = codebook(name, kind="sorted_codes")
    middle = codebook(name, kind="midpoints")

    def codes(values: torch.Tensor) -> torch.Tensor:
        packed, _ = blocks.quantize_4bit(torch.cat([values, torch.ones(1)]), name, 32)
        return torch.stack([packed >> 4, packed & 15], dim=1).view(-1)[:15]

    at, above = codes(middle), codes(middle.nextafter(torch.full((15,), 2.0)))
    if name == "fp4":  # the midpoint of its two zeros is 0: zero has code 0, the smallest positive number code 8
        assert at[7] == 0 and above[7] == 8
    assert torch.equal(at, order[:15])
    assert torch.equal(above, order[1:])


@pytest.mark.parametrize("name", ["nf4", "fp4"])
def test_zeros(name):
    """All-zero blocks: absmax 0 where the block is full, 1e-38 in a short last one; zeros come back either way."""
    packed, absmax = blocks.quantize_4bit(torch.zeros(100), name, 64)
    assert absmax.tolist() == [0.0, torch.tensor(1e-38).item()]
    assert (packed == (0x77 if name == "nf4" else 0)).all()
    assert (blocks.dequantize_4bit(packed, absmax, name, 64, (100,), torch.float16) == 0).all()
    minus = blocks.quantize_4bit(torch.tensor([-0.0, 0.0, 1.0, -1.0]), name, 32)
    assert blocks.dequantize_4bit(*minus, name, 32, (4,), torch.float32).tolist() == [0, 0, 1, -1]


@pytest.mark.parametrize("name, pad", [("nf4", 7), ("fp4", 0)])
def test_odd_count_is_padded_with_the_code_of_zero(name, pad):
    packed, _ = blocks.quantize_4bit(torch.ones(3), name, 32)
    assert packed.shape == (2,) and packed[1] & 15 == pad


def test_input_is_not_touched_and_needs_no_layout():
    x = torch.randn(6, 5, 8)
    before = x.clone()
    y = x.permute(2, 0, 1)
    assert not y.is_contiguous()
    for a, b in zip(blocks.quantize_4bit(y, "nf4", 32), blocks.quantize_4bit(y.contiguous(), "nf4", 32), strict=True):
        assert same(a, b)
    assert same(x, before)
    leaf = torch.ones(64, requires_grad=True)
    assert not blocks.quantize_4bit(leaf, "nf4", 64)[1].requires_grad


def test_sizes_that_do_not_belong_together_are_refused():
    packed, absmax = blocks.quantize_4bit(torch.randn(4, 64), "nf4", 64)
    with pytest.raises(ValueError, match=r"128 packed bytes and 4 scales are not a nf4 tensor of shape \[4, 32\]"):
        blocks.dequantize_4bit(packed, absmax, "nf4", 64, (4, 32), torch.float32)
    with pytest.raises(ValueError, match="blocks of 128"):
        blocks.dequantize_4bit(packed, absmax, "nf4", 128, (4, 64), torch.float32)
