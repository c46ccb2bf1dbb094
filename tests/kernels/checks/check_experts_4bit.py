"""Products over experts in Triton against float64, row by row: uneven routing, experts without rows, rows of nobody."""

from __future__ import annotations

import pytest
import torch

from kbit.formats import blocks, double
from kbit.kernels.triton import experts_4bit as experts
from kbit.kernels.triton.experts_8bit import tile_count
from kbit.kernels.triton.tiles import Tile

TOLERANCE = {torch.float32: 1e-6, torch.float16: 6e-4, torch.bfloat16: 4e-3}
ROUTINGS = [(21, (2, 2, 20, 21)), (3, (0, 0, 3, 3)), (9, (0, 5, 5, 7)), (2, (0, 0, 0, 0)), (40, (0, 40, 40, 40))]
DTYPES = [*TOLERANCE, torch.bfloat16, torch.float32]
SIZES = [(70, 128, 64), (20, 384, 128), (13, 33, 32), (19, 100, 64), (1, 7, 4096)]  # N, K, block size


def weights(kind, n, k, block_size, device):
    """(forward(x, offsets, bias, tile), gradient(grad, offsets), W [4, N, K] float64)"""
    w = torch.randn(4, n, k) * 0.05
    packed, absmax = blocks.quantize_4bit(w, kind, block_size)
    parts = [absmax.view(torch.int32), None, None]
    if kind == "nf4":
        parts = list(double.quantize_absmax(absmax))
        absmax = double.dequantize_absmax(*parts)
    exact = blocks.dequantize_4bit(packed, absmax, kind, block_size, w.shape, torch.float32).double()
    parts = [packed.to(device), *(t if t is None else t.to(device) for t in parts)]
    return (
        lambda x, o, b, t=None: experts.experts_4bit(x, o, *parts, b, kind, block_size, n, t),
        lambda g, o: experts.experts_4bit_grad_input(g, o, *parts, kind, block_size, k),
        exact,
    )


def by_expert(x, ends, w, bias=None):
    out = torch.zeros(x.shape[0], w.shape[1], dtype=torch.float64)
    for row in range(x.shape[0]):
        e = sum(end <= row for end in ends)
        if e < len(ends):
            out[row] = w[e] @ x[row].double() + (0 if bias is None else bias[e].double())
    return out


def close(out, expected, dtype):
    out = out.cpu().double()
    assert out.isfinite().all() and out.shape == expected.shape
    assert (out - expected).norm() <= TOLERANCE[dtype] * expected.norm()


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("size, dtype", list(zip(SIZES, DTYPES, strict=True)), ids=str)
def test_product_and_gradient(kind, size, dtype, device):
    n, k, block_size = size
    forward, gradient, w = weights(kind, n, k, block_size, device)
    for rows, ends in ROUTINGS:
        offsets = torch.tensor(ends, dtype=torch.int32, device=device)
        x, bias, grad = torch.randn(rows, k).to(dtype), torch.randn(4, n).to(dtype), torch.randn(rows, n).to(dtype)
        close(forward(x.to(device), offsets, bias.to(device)), by_expert(x, ends, w, bias), dtype)
        close(gradient(grad.to(device), offsets), by_expert(grad, ends, w.transpose(1, 2)), dtype)


@pytest.mark.parametrize("split", [2, 3])
def test_split_k_and_many_rows(split, device):
    forward, _, w = weights("nf4", 40, 256, 64, device)
    ends = (0, 33, 70, 72)
    offsets = torch.tensor(ends, dtype=torch.int32, device=device)
    x, bias = torch.randn(75, 256), torch.randn(4, 40)
    out = forward(x.to(device), offsets, bias.to(device), Tile(bm=16, bn=32, bk=64, split=split))
    close(out, by_expert(x, ends, w, bias), torch.float32)


def test_no_rows_and_strides(device):
    forward, gradient, w = weights("nf4", 8, 64, 64, device)
    offsets = torch.tensor((0, 0, 0, 0), dtype=torch.int32, device=device)
    assert forward(torch.empty(0, 64, device=device), offsets, None).shape == (0, 8)
    assert gradient(torch.empty(0, 8, device=device), offsets).shape == (0, 64)
    ends = (1, 2, 3, 3)
    offsets = torch.tensor(ends, dtype=torch.int32, device=device)
    x = torch.randn(64, 3).t()
    close(forward(x.to(device), offsets, None), by_expert(x, ends, w), torch.float32)


def test_the_grid_holds_every_routing():
    for rows in (0, 1, 7, 40, 1000):
        for count, bm in ((1, 16), (8, 16), (64, 128)):
            bound = tile_count(rows, count, bm)
            for _ in range(20):
                spread = torch.multinomial(torch.rand(count + 1) ** 4 + 1e-6, rows, True) if rows else torch.zeros(0)
                tiles = sum(-(-int(c) // bm) for c in torch.bincount(spread.long(), minlength=count + 1))
                assert tiles <= bound
