"""4-bit kernels of the native CPU library, at every level that this machine runs, against float64 and the reference.

Tolerance of a product: the weight is dequantized to x's dtype, sums are fp32, the result is rounded to x's dtype. The
error stays within half a unit in the last place of the result, plus a few fp32 roundings of the sum of magnitudes.
"""

from __future__ import annotations

import os

import pytest
import torch

import kbit
from kbit.kernels.cpu import build, library
from kbit.ops import choose, cpu, reference

UNIT = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
DTYPES = list(UNIT)


def levels() -> list[str]:
    try:
        build.compiler()
    except build.BuildError:
        return []
    found = library.library() if library.available() else None
    names = list(build.levels())
    return names[: names.index(found.level) + 1] if found else []


@pytest.fixture(params=levels() or [None])
def level(request, monkeypatch):
    """Every test of this file runs on the code of each level; what is compiled stays in the user's cache."""
    if request.param is None:
        pytest.skip("no native library here")
    highest = library.library().level
    if request.param != highest or os.environ.get("KBIT_CPU_LEVEL"):
        monkeypatch.setenv("KBIT_CPU_LEVEL", request.param)
        cpu.reset()
    assert library.library().level == request.param
    yield request.param
    monkeypatch.undo()
    cpu.reset()


def make(n, k, codebook="nf4", block_size=64, double_quant=True, seed=0):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(n, k, generator=generator) * torch.rand(n, 1, generator=generator) * 0.1
    return kbit.quantize(weight, codebook, block_size=block_size, double_quant=double_quant)


def arguments(q):
    return (q.codes, q.absmax, q.nested_absmax, q.nested_offset)


def oracle(q, dtype):
    """float64 of the weight dequantized to `dtype`, in plain torch."""
    scales = (q.absmax, q.nested_absmax, q.nested_offset)
    shape = tuple(q.shape)
    return reference.dequantize_4bit(q.codes, *scales, q.format.name, q.format.block_size, shape, dtype).double()


def check(out, x, w, bias=None):
    exact = x.double() @ w.t()
    magnitude = x.double().abs() @ w.t().abs()
    if bias is not None:
        exact, magnitude = exact + bias.double(), magnitude + bias.double().abs()
    allowed = exact.abs() * UNIT[out.dtype] * 1.01 + magnitude * 2.0**-21 + torch.finfo(out.dtype).tiny
    assert out.isfinite().all()
    worst = ((out.double() - exact).abs() / allowed).max()
    assert worst <= 1, f"{float(worst):.2f} times the allowed error"


def poison(*shapes_dtypes):
    """Leave NaN in the memory that the allocator hands out next: what is not written shows."""
    for shape, dtype in shapes_dtypes:
        torch.full(shape, float("nan"), dtype=dtype)


def product(q, x, bias=None):
    n = q.shape[0]
    poison(((*x.shape[:-1], n), x.dtype))
    return torch.ops.kbit.linear_4bit(x, *arguments(q), bias, q.format.name, q.format.block_size, n)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("n", "k", "codebook", "block_size", "double_quant"),
    [
        (96, 256, "nf4", 64, True),
        (50, 4160, "fp4", 64, False),  # more than one depth of the strip, and half a chunk at the end
        (7, 96, "nf4", 32, True),
        (101, 544, "nf4", 32, False),
        (64, 8192, "fp4", 4096, True),
        (33, 768, "nf4", 256, True),
        (1, 64, "nf4", 64, False),
    ],
)
def test_products_in_row_layout(level, dtype, n, k, codebook, block_size, double_quant):
    q = make(n, k, codebook, block_size, double_quant)
    assert q.codes.dim() == 2
    w, bias = oracle(q, dtype), torch.randn(n).to(dtype)
    for m in (1, 2, 3, 4, 5, 7, 9, 13, 21, 40, 63):
        x = torch.randn(m, k).to(dtype)
        check(product(q, x), x, w)
        check(product(q, x, bias), x, w, bias)


@pytest.mark.parametrize("dtype", DTYPES)
def test_many_tokens_that_lie_apart(level, dtype):
    """More tokens than are packed at once, read from the middle of a larger tensor."""
    q, whole = make(50, 192), torch.randn(300, 256).to(dtype)
    w, x = oracle(q, dtype), whole[3:290, 5:197]
    check(product(q, x), x, w)


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_not_finite_stays_with_its_token_and_its_row(level, dtype):
    q = make(50, 192)
    w, x = oracle(q, dtype), torch.randn(37, 192).to(dtype)
    x[20, 7] = float("inf")
    out = product(q, x)
    assert not out[20].isfinite().any()
    rest = [m for m in range(37) if m != 20]
    check(out[rest], x[rest], w)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "k", "block_size"), [(5, 63, 64), (17, 100, 64), (3, 33, 32), (40, 1000, 4096)])
def test_products_in_flat_layout(level, dtype, n, k, block_size):
    q = make(n, k, block_size=block_size)
    assert q.codes.dim() == 1
    w, bias = oracle(q, dtype), torch.randn(n).to(dtype)
    for m in (1, 6):
        x = torch.randn(m, k).to(dtype)
        check(product(q, x, bias), x, w, bias)


@pytest.mark.parametrize("dtype", DTYPES)
def test_slices_and_the_fused_kernel_agree_with_the_oracle(level, dtype, monkeypatch):
    path = choose.linear_4bit_cpu_path
    monkeypatch.setattr(choose, "linear_4bit_cpu_path", lambda m, *rest: path(m, *rest) if m <= 3 else "sliced")
    monkeypatch.setattr(choose, "cpu_slice_rows", lambda m, dtype: 16)
    q = make(90, 256)
    w, bias = oracle(q, dtype), torch.randn(90).to(dtype)
    for m in (3, 4, 20):
        x = torch.randn(m, 256).to(dtype)
        check(product(q, x, bias), x, w, bias)
        check(product(q, x), x, w)


@pytest.mark.parametrize("dtype", DTYPES)
def test_decoding_is_exact(level, dtype):
    """To the bit, whole and in rows; odd starts, odd ends, short last blocks."""
    for n, k, block_size in ((3, 64, 64), (5, 77, 32), (70, 130, 256), (1, 1, 64), (2, 4097, 64), (4, 4096, 64)):
        for codebook in ("nf4", "fp4"):
            for double_quant in (True, False):
                q = make(n, k, codebook, block_size, double_quant)
                expected = oracle(q, dtype).to(dtype)
                poison(((n, k), dtype))
                assert torch.equal(q.dequantize(dtype), expected)
                ids = torch.tensor([[n - 1, 0], [n // 2, n - 1]])
                rows = torch.ops.kbit.embedding_4bit(ids, *arguments(q), codebook, block_size, k, dtype)
                assert torch.equal(rows, expected[ids])


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradient_of_the_input(level, dtype):
    for n, k, block_size in ((70, 640, 64), (9, 100, 32), (33, 77, 64)):
        q = make(n, k, block_size=block_size)
        grad = torch.randn(5, n).to(dtype)
        poison(((5, k), dtype))
        out = torch.ops.kbit.linear_4bit_grad_input(grad, *arguments(q), "nf4", block_size, k)
        check(out, grad, oracle(q, dtype).t())


def test_embedding_rows_out_of_range(level):
    q = make(4, 64)
    for row in (-1, 4):
        with pytest.raises(IndexError, match="out of range"):
            torch.ops.kbit.embedding_4bit(torch.tensor([0, row]), *arguments(q), "nf4", 64, 64, torch.float32)


def test_any_strides(level):
    """Rows that are far apart, overlap, are reversed in memory or columns of something else; leading dimensions."""
    q = make(20, 128)
    w = oracle(q, torch.float32)
    wide = torch.randn(6, 300)
    for x in (wide[:, 5:133], wide[::2, :128], torch.randn(128, 6).t(), wide[0, :128].expand(3, 128), wide[:1, :128]):
        check(product(q, x), x, w)
    x = torch.randn(2, 3, 1, 128)
    assert product(q, x).shape == (2, 3, 1, 20)
    check(product(q, x).view(6, 20), x.view(6, 128), w)


def test_empty(level):
    q = make(20, 128)
    assert product(q, torch.randn(0, 128)).shape == (0, 20)
    assert product(q, torch.randn(3, 0, 128)).shape == (3, 0, 20)
    grad = torch.ops.kbit.linear_4bit_grad_input(torch.randn(0, 20), *arguments(q), "nf4", 64, 128)
    assert grad.shape == (0, 128)


def test_infinite_input_stays_where_it_is(level):
    q = make(20, 192)
    x = torch.randn(6, 192)
    x[2, 7] = float("inf")
    out = product(q, x)
    assert not out[2].isfinite().any() and out[[0, 1, 3, 4, 5]].isfinite().all()


def test_threads_do_not_change_a_bit(level):
    q = make(200, 512)
    before = torch.get_num_threads()
    try:
        for dtype in DTYPES:
            for m in (1, 9):
                x = torch.randn(m, 512).to(dtype)
                results = []
                for threads in (1, 2, 3, 8):
                    torch.set_num_threads(threads)
                    results.append(product(q, x))
                assert all(torch.equal(results[0], other) for other in results)
    finally:
        torch.set_num_threads(before)


def test_experts(level):
    """Experts with no, one and many rows, and rows that belong to none."""
    e, n, k = 5, 40, 128
    weight = torch.randn(e, n, k)
    q = kbit.quantize(weight, "nf4")
    offsets = torch.tensor([3, 3, 4, 19, 20], dtype=torch.int32)
    x, bias = torch.randn(22, k), torch.randn(e, n)
    decoded = reference.dequantize_4bit(*arguments(q), "nf4", 64, (e, n, k), torch.float32).double()
    poison(((22, n), torch.float32))
    out = torch.ops.kbit.experts_4bit(x, offsets, *arguments(q), bias, "nf4", 64, n)
    grad = torch.randn(22, n)
    back = torch.ops.kbit.experts_4bit_grad_input(grad, offsets, *arguments(q), "nf4", 64, k)
    for i, (begin, end) in enumerate(((0, 3), (3, 3), (3, 4), (4, 19), (19, 20))):
        if begin < end:
            check(out[begin:end], x[begin:end], decoded[i], bias[i])
            check(back[begin:end], grad[begin:end], decoded[i].t())
    assert not out[20:].any() and not back[20:].any()


def test_wrong_sizes_are_refused(level):
    q = make(20, 128)
    codes, absmax, nested, offset = arguments(q)
    x = torch.randn(2, 128)
    for bad in (
        (codes[:10], absmax, nested, offset),
        (codes, absmax[:10], nested, offset),
        (codes, absmax, nested[:0], offset),
    ):
        with pytest.raises(RuntimeError, match=r"codes|scales"):
            torch.ops.kbit.linear_4bit(x, *bad, None, "nf4", 64, 20)


def test_layers_train_and_compile():
    layer = kbit.nn.Linear4bit.from_linear(torch.nn.Linear(128, 48), "nf4")
    w = layer.dequantize().double()
    x = torch.randn(5, 128, requires_grad=True)
    out = torch.compile(layer, fullgraph=True, backend="aot_eager")(x)
    out.sum().backward()
    plain = x.detach().double().requires_grad_()
    expected = torch.nn.functional.linear(plain, w, layer.bias.detach().double())
    expected.sum().backward()
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(x.grad.double(), plain.grad, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(layer.bias.grad, torch.full((48,), 5.0))
