"""The worked example and the tables of docs/format.md are what the code does."""

from __future__ import annotations

import re
import struct
from pathlib import Path

import pytest
import torch

import kbit
from kbit.formats.codebooks import codebook
from kbit.formats.double import dequantize_absmax, quantize_absmax

DOCUMENT = (Path(__file__).parents[2] / "docs" / "format.md").read_text()
X = torch.tensor([[0.5, -1.0, 0.25, 0.0, 2.0, -0.125, 1.5]])


def row(name: str) -> list[str]:
    (line,) = re.findall(rf"^\| {name}(?: \(one row\))? \| `([^`]+)` \| `([^`]+)` \| (.+) \|$", DOCUMENT, re.M)
    return list(line)


@pytest.mark.parametrize("name", ["nf4", "fp4", "int8", "dynamic8"])
def test_worked_example(name):
    codes, absmax, decoded = row(name)
    plain = f"{name}-plain" if name in ("nf4", "fp4") else name
    q = kbit.quantize(X, plain)
    assert q.codes.numpy().tobytes().hex() == codes
    assert q.absmax.numpy().tobytes().hex() == absmax
    values = torch.tensor([float(v) for v in decoded.split(",")])
    torch.testing.assert_close(q.dequantize()[0], values, rtol=0, atol=1e-7)


def test_worked_double_quantization():
    codes, nested, offset = quantize_absmax(torch.tensor([2.0, 1.0, 0.5, 3.0]))
    text = " ".join(DOCUMENT.split())
    expected = (
        f"offset {offset.item():g} (`{offset.numpy().tobytes().hex()}`), nested absmax {nested.item():g} "
        f"(`{nested.numpy().tobytes().hex()}`), codes `{codes.numpy().tobytes().hex()}`"
    )
    assert expected in text
    decoded = re.search(r"codes `cb260cff`, decoded ([\d., ]+)\.", text)
    assert decoded is not None
    values = torch.tensor([float(v) for v in decoded.group(1).split(",")])
    torch.testing.assert_close(dequantize_absmax(codes, nested, offset), values, rtol=0, atol=1e-7)


@pytest.mark.parametrize("name, index", [("nf4", 0), ("fp4", 1)])
def test_codebooks(name, index):
    block = re.findall(r"^```\n((?:[0-9a-f]{8}[ \n])+)```$", DOCUMENT, re.M)[index]
    assert [struct.pack(">f", v).hex() for v in codebook(name).tolist()] == block.split()


def test_sorted_order_of_fp4():
    order = codebook("fp4", kind="sorted_codes").tolist()
    assert str(order).replace(" ", "") in DOCUMENT
