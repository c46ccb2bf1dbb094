"""Look-ups in quantized tables equal look-ups in the dequantized table, to the bit."""

from __future__ import annotations

import pytest
import torch

from kbit import ops
from tests.ops.helpers import FOUR_BIT, weight_4bit, weight_8bit


@pytest.mark.parametrize("label", FOUR_BIT)
@pytest.mark.parametrize("rows, dim, block_size", [(50, 64, 64), (40, 256, 32), (13, 33, 64), (7, 1, 32), (9, 96, 64)])
@pytest.mark.parametrize("bits", [True, False])
def test_4bit(label, rows, dim, block_size, bits):
    parts, w = weight_4bit(rows, dim, label, block_size, bits)
    empty = torch.zeros(0, dtype=torch.long)
    for ids in (torch.randint(rows, (3, 5)), torch.tensor(rows - 1), empty, torch.arange(rows)):
        for dtype in (torch.float32, torch.bfloat16):
            for kind in (torch.int64, torch.int32, torch.uint8):
                out = ops.embedding_4bit(ids.to(kind), *parts, label[:3], block_size, dim, dtype)
                assert out.dtype == dtype and torch.equal(out, w.to(dtype)[ids])


@pytest.mark.parametrize("bits", [True, False])
def test_8bit(bits):
    parts, w = weight_8bit(13, 33, bits)
    for ids in (torch.randint(13, (3, 5)), torch.tensor(12), torch.zeros(2, 0, dtype=torch.long)):
        out = ops.embedding_8bit(ids, *parts, torch.bfloat16)
        assert torch.equal(out, w.bfloat16()[ids])


def test_many_blocks_of_nested_scales():
    """Rows far down the table read their own nested scale, not the first one."""
    parts, w = weight_4bit(600, 128)
    assert parts[2].numel() == 5
    ids = torch.tensor([599, 0, 300])
    assert torch.equal(ops.embedding_4bit(ids, *parts, "nf4", 64, 128, torch.float32), w[ids])


@pytest.mark.parametrize("bad", [-1, 13, 10**6])
@pytest.mark.parametrize("dim", [64, 33])
def test_ids_out_of_range(bad, dim):
    ids = torch.tensor([0, bad])
    with pytest.raises((IndexError, RuntimeError)):
        ops.embedding_4bit(ids, *weight_4bit(13, dim)[0], "nf4", 64, dim, torch.float32)
    with pytest.raises((IndexError, RuntimeError)):
        ops.embedding_8bit(ids, *weight_8bit(13, dim)[0], torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bool])
def test_ids_that_are_not_integers(dtype):
    ids = torch.ones(2).to(dtype)
    with pytest.raises(TypeError, match="integer ids"):
        ops.embedding_4bit(ids, *weight_4bit(13, 64)[0], "nf4", 64, 64, torch.float32)
    with pytest.raises(TypeError, match="integer ids"):
        ops.embedding_8bit(ids, *weight_8bit(13, 64)[0], torch.float32)
