from __future__ import annotations

import struct
import subprocess
import sys

import pytest
import torch

from kbit.formats.codebooks import PAD_CODE, codebook, dynamic_map
from tests.formats.helpers import bitsandbytes, golden, same

NAMES = ("nf4", "fp4", "dynamic8", "dynamic8-unsigned")
# fp32 bit patterns, big-endian.
BITS = {
    "nf4": "bf800000 bf3239b1 bf066b30 beca32a0 be91a24d be3d353f bdba7871 00000000 "
    "3da2faff 3e24cae3 3e7c04dd 3ead033a 3ee1a4b8 3f1007ab 3f3913b3 3f800000",
    "fp4": "00000000 3baaaaab 3f2aaaab 3f800000 3eaaaaab 3f000000 3e2aaaab 3e800000 "
    "00000000 bbaaaaab bf2aaaab bf800000 beaaaaab bf000000 be2aaaab be800000",
}


@pytest.mark.parametrize("name", BITS)
def test_exact_bits(name):
    assert [struct.pack(">f", value).hex() for value in codebook(name).tolist()] == BITS[name].split()


@pytest.mark.parametrize("name", NAMES)
def test_values_equal_bitsandbytes_golden_to_the_bit(name):
    assert same(codebook(name), golden("eight_bit")[f"map/{name}"])


@pytest.mark.parametrize("name", NAMES)
def test_values_equal_live_bitsandbytes_to_the_bit(name):
    functional = bitsandbytes()
    if name in ("nf4", "fp4"):
        live = functional.get_4bit_type(name, "cpu")
    else:
        live = functional.create_dynamic_map(signed=name == "dynamic8")
    assert same(codebook(name), live)


def test_fp4_is_a_sign_and_twelfths():
    magnitudes = torch.tensor([0, 1 / 16, 8, 12, 4, 6, 2, 3], dtype=torch.float64) / 12
    assert same(codebook("fp4"), torch.cat([magnitudes, 0.0 - magnitudes]).float())  # both zeros are +0


def test_nf4_is_sorted_and_spans_one():
    values = codebook("nf4")
    assert values[0] == -1 and values[7] == 0 and values[15] == 1
    assert (values.diff() > 0).all()


@pytest.mark.parametrize("signed", [True, False])
def test_dynamic_map_shape_and_ends(signed):
    values = dynamic_map(signed)
    assert values.shape == (256,) and values.dtype == torch.float32
    assert (values.diff() > 0).all() and values[-1] == 1
    assert values[0] == (torch.tensor(-0.992968738079071) if signed else 0)
    assert (values == 0).sum() == 1


@pytest.mark.parametrize("name", ["nf4", "fp4"])
def test_derived_tables(name):
    values = codebook(name)
    pairs = codebook(name, kind="pairs")
    for byte in range(256):
        assert pairs[byte, 0] == values[byte >> 4] and pairs[byte, 1] == values[byte & 15]
    order = codebook(name, kind="sorted_codes").long()
    assert sorted(order.tolist()) == list(range(16))
    assert (values[order].diff() >= 0).all()
    midpoints = codebook(name, kind="midpoints")
    assert same(midpoints, (values[order][1:] + values[order][:-1]) / 2)
    assert values[PAD_CODE[name]] == 0


def test_zero_codes():
    assert codebook("dynamic8")[codebook("dynamic8", kind="zero_code").item()] == 0
    assert codebook("dynamic8-unsigned", kind="zero_code") == 0


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="unknown codebook 'nf5'"):
        codebook("nf5")
    with pytest.raises(ValueError, match="unknown kind of table 'pears'"):
        codebook("nf4", kind="pears")


def test_first_use_under_unusual_defaults_gives_the_same_tables():
    """Loaders set default dtypes and devices, and may be the first to touch a table: it must not remember them."""
    script = """
import torch
from kbit.formats.codebooks import codebook
names = ("nf4", "fp4", "dynamic8", "dynamic8-unsigned")
kinds = ("values", "midpoints", "sorted_codes", "zero_code")
torch.set_default_dtype(torch.float64)
with torch.device("meta"), torch.inference_mode():
    tables = {(n, k): codebook(n, kind=k) for n in names for k in kinds}
assert all(t.device.type == "cpu" and not t.is_inference() for t in tables.values())
assert all(t.dtype == torch.float32 for (n, k), t in tables.items() if k in ("values", "midpoints"))
print(float(sum(t.double().abs().sum() for t in tables.values())))
"""
    sums = [
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
        for code in (script, script.replace("torch.set_default_dtype(torch.float64)", "").replace('"meta"', '"cpu"'))
    ]
    assert sums[0] == sums[1] and float(sums[0]) > 0
