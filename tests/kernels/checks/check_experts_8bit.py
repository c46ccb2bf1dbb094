"""The int8 products over experts in Triton against float64, whatever the routing."""

from __future__ import annotations

import pytest
import torch

from kbit.formats import blocks
from kbit.kernels.triton.experts_8bit import experts_8bit, experts_8bit_grad_input
from kbit.kernels.triton.tiles import Tile

TOLERANCE = {torch.float32: 1e-6, torch.float16: 8e-4, torch.bfloat16: 6e-3}
ROUTINGS = {  # rows of each expert; the last number is rows of none
    "even": [4, 4, 4, 4, 0],
    "some empty": [0, 7, 0, 1, 0],
    "one has all": [0, 0, 70, 0, 0],
    "rows of none": [3, 0, 17, 2, 5],
    "none at all": [0, 0, 0, 0, 4],
    "one row": [0, 0, 0, 1, 0],
}


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_dtypes(dtype, device):
    check(40, 64, "rows of none", dtype, device)


@pytest.mark.parametrize("routing", ROUTINGS)
def test_product_and_gradient(routing, device):
    check(33, 50, routing, torch.bfloat16, device)


def check(n, k, routing, dtype, device):
    counts = torch.tensor(ROUTINGS[routing])
    experts, s = len(counts) - 1, int(counts.sum())
    offsets = counts[:-1].cumsum(0).int()
    codes, absmax = blocks.quantize_int8(torch.randn(experts, n, k) * 0.05)
    exact = codes.double() * absmax.double()[..., None] / 127
    x, grad, bias = torch.randn(s, k).to(dtype), torch.randn(s, n).to(dtype), torch.randn(experts, n).to(dtype)
    parts = [t.to(device) for t in (offsets, codes, absmax.view(torch.int32))]
    owner = torch.repeat_interleave(torch.arange(experts + 1), counts)
    inside = (owner < experts)[:, None]
    owner = owner.clamp(max=experts - 1)
    product = torch.einsum("sk,snk->sn", x.double(), exact[owner])
    back = torch.einsum("sn,snk->sk", grad.double(), exact[owner])
    for tile in (None, Tile(16, 32, 32), Tile(32, 16, 64)):
        for b in (bias, None):
            out = experts_8bit(x.to(device), *parts, None if b is None else b.to(device), tile)
            close(out, (product + (0 if b is None else b.double()[owner])) * inside, dtype)
        close(experts_8bit_grad_input(grad.to(device), *parts, tile), back * inside, dtype)


def close(out, expected, dtype):
    assert out.dtype == dtype and out.shape == expected.shape and out.isfinite().all()
    error = (out.cpu().double() - expected).norm().item()
    assert error <= TOLERANCE[dtype] * expected.norm().item()


def test_empty(device):
    offsets = torch.zeros(3, dtype=torch.int32, device=device)
    codes = torch.zeros(3, 8, 16, dtype=torch.int8, device=device)
    scales = torch.zeros(3, 8, device=device)
    assert experts_8bit(torch.empty(0, 16, device=device), offsets, codes, scales, None).shape == (0, 8)
    assert experts_8bit_grad_input(torch.empty(0, 8, device=device), offsets, codes, scales).shape == (0, 16)
