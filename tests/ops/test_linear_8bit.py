"""LLM.int8() against an independent float64 implementation; the product at few tokens; gradients."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.utils.checkpoint import checkpoint

from kbit import ops
from kbit.ops import choose, reference
from kbit.ops.reference import int8_product, llm_int8
from tests.ops.helpers import close, weight_8bit

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
M = choose.WEIGHT_ONLY_TOKENS + 15


def paper(x: torch.Tensor, codes: torch.Tensor, absmax: torch.Tensor, threshold: float) -> np.ndarray:
    """LLM.int8() written from the paper in numpy float64, one row and one column at a time. [M, N]"""
    values = x.double().numpy()
    weight = codes.numpy().astype(np.float64)
    scales = absmax.view(torch.float32).double().numpy()
    rows, columns = values.shape
    outliers = [k for k in range(columns) if threshold > 0 and (np.abs(values[:, k]) >= threshold).any()]
    out = np.zeros((rows, len(weight)))
    for m in range(rows):
        small = [abs(v) for v in values[m] if not (threshold > 0 and abs(v) >= threshold)]
        row_scale = max(small, default=0.0)
        for k in range(columns):
            if k in outliers:
                out[m] += values[m, k] * weight[:, k] * scales / 127
            elif row_scale > 0:
                out[m] += np.rint(values[m, k] * 127 / row_scale) * weight[:, k] * scales * row_scale / 127**2
    return out


def activations(kind: str, k: int = 48) -> torch.Tensor:
    x = torch.randn(M, k)
    if kind == "absent":
        return x.clamp(-3, 3)
    if kind == "present":
        x[3, 5], x[7, 5], x[0, 40] = 20.0, -1.0, -6.0
        return x
    return x.sign() * (6 + x.abs())  # every element of every column


@pytest.mark.parametrize("kind", ["absent", "present", "all"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("threshold", [6.0, 0.0, 2.5])
def test_llm_int8_against_the_paper(kind, dtype, threshold):
    parts, _ = weight_8bit(9, 48)
    x = activations(kind).to(dtype)
    bias = torch.randn(9)
    out = ops.linear_8bit(x, *parts, bias.to(dtype), threshold)
    assert out.dtype == dtype
    expected = torch.from_numpy(paper(x, *parts, threshold)) + bias.to(dtype).double()
    # A code that lies on a rounding boundary may differ by one: allow a few of them in fp32's place.
    worst = float((out.double() - expected).abs().max())
    limit = {torch.float32: 2e-4, torch.float16: 3e-3, torch.bfloat16: 2e-2}[dtype] * float(expected.abs().max())
    assert worst <= limit


def test_outliers_need_the_decomposition():
    """What the method is for: one huge feature ruins plain int8 and does not touch LLM.int8()."""
    parts, w = weight_8bit(32, 256)
    x = torch.randn(64, 256)
    x[:, 17] *= 300
    exact = x.double() @ w.double().T
    plain = ops.linear_8bit(x, *parts, None, 0.0).double() - exact
    mixed = ops.linear_8bit(x, *parts, None, 6.0).double() - exact
    rest = x.clone()
    rest[:, 17] = 0
    size = (rest.double() @ w.double().T).norm()
    assert plain.norm() / size > 0.2 and mixed.norm() / size < 0.02


@pytest.mark.parametrize("threshold", [0.0, 6.0])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_and_infinity_stay_in_their_row(threshold, bad):
    parts, _ = weight_8bit(9, 48)
    x = activations("present")
    clean = ops.linear_8bit(x, *parts, None, threshold)
    x[4, 30] = bad
    out = ops.linear_8bit(x, *parts, None, threshold)
    others = [m for m in range(M) if m != 4]
    assert out[others].isfinite().all() and not out[4].isfinite().any()
    if threshold == 0 or bad != bad:  # an infinite column becomes an outlier column for all rows
        assert torch.equal(out[others], clean[others])
    few = ops.linear_8bit(x[3:6], *parts, None, threshold)
    assert few[[0, 2]].isfinite().all() and not few[1].isfinite().any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 48), (48,), (2, 8, 48), (0, 48), (2, 0, 48), (16, 48)])
def test_few_tokens_read_the_weight_alone(shape, dtype):
    parts, w = weight_8bit(9, 48)
    x = torch.randn(shape).to(dtype) * 10
    bias = torch.randn(9).to(dtype)
    out = ops.linear_8bit(x, *parts, bias, 6.0)
    assert out.dtype == dtype
    close(out, x.double() @ w.to(dtype).double().T + bias.double())


def test_zero_rows_and_zero_weights():
    parts, _ = weight_8bit(9, 48)
    x = torch.randn(M, 48)
    x[2] = 0
    assert (ops.linear_8bit(x, *parts, None, 6.0)[2] == 0).all()
    parts[0][4] = 0
    parts[1].view(torch.float32)[4] = 0
    out = ops.linear_8bit(x, *parts, None, 6.0)
    assert out.isfinite().all() and (out[:, 4] == 0).all()


@pytest.mark.parametrize("m, k", [(5, 0), (30, 0)])
def test_no_features(m, k):
    parts, _ = weight_8bit(4, k)
    assert (ops.linear_8bit(torch.empty(m, k), *parts, torch.ones(4), 6.0) == 1).all()


@pytest.mark.parametrize(
    "m, n, k",
    [(17, 5, 33), (1, 1, 1), (9, 8, 1), (100, 64, 1), (20, 64, 4096), (3, 7, 140_000), (0, 4, 8), (33, 16, 64)],
)
def test_int8_product_is_exact(m, n, k):
    a = torch.randint(-128, 128, (m, k), dtype=torch.int8)
    b = torch.randint(-128, 128, (n, k), dtype=torch.int8)
    if k > 100_000:  # more than an int32 holds
        a.fill_(127)
        b.fill_(127)
    expected = a.numpy().astype(np.int64) @ b.numpy().astype(np.int64).T
    assert np.array_equal(int8_product(a, b).numpy().astype(np.int64), expected)


def test_rows_do_not_depend_on_each_other_without_outliers():
    parts, _ = weight_8bit(9, 48)
    x = activations("absent")
    absmax = parts[1].view(torch.float32)
    assert torch.equal(llm_int8(x, parts[0], absmax, 6.0)[3], llm_int8(x[3:4], parts[0], absmax, 6.0)[0])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("m", [3, M])
def test_gradients_go_through_the_dequantized_weight(dtype, m):
    parts, w = weight_8bit(9, 48)
    x = activations("present")[:m].to(dtype).requires_grad_()
    bias = torch.randn(9).to(dtype).requires_grad_()
    out = ops.linear_8bit(x, *parts, bias, 6.0)
    grad = torch.randn_like(out)
    out.backward(grad)
    close(x.grad, grad.double() @ w.to(dtype).double())
    close(bias.grad, grad.double().sum(0))
    for other in (torch.ones(1, 1).to(dtype).expand(m, 9), torch.randn(9, m).to(dtype).t()):
        x.grad = None
        ops.linear_8bit(x, *parts, None, 6.0).backward(other)
        close(x.grad, other.double() @ w.to(dtype).double())


def test_gradcheck():
    parts, _ = weight_8bit(3, 11)
    x = torch.randn(2, 1, 11, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(3, dtype=torch.float64, requires_grad=True)
    function = lambda x, bias: ops.linear_8bit(x, *parts, bias, 6.0)  # noqa: E731
    assert gradcheck(function, (x, bias)) and gradgradcheck(function, (x, bias))


def test_second_gradient_is_linear_at_many_tokens():
    parts, w = weight_8bit(9, 48)
    x = activations("present").requires_grad_()
    grad = torch.randn(M, 9, requires_grad=True)
    (first,) = torch.autograd.grad(ops.linear_8bit(x, *parts, None, 6.0), x, grad, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), grad)
    close(second, torch.ones(M, 48, dtype=torch.float64) @ w.double().T)


def test_layout_of_input_does_not_matter():
    parts, _ = weight_8bit(9, 48)
    x = activations("present")
    expected = ops.linear_8bit(x, *parts, None, 6.0)
    assert torch.equal(ops.linear_8bit(x.t().contiguous().t(), *parts, None, 6.0), expected)
    assert torch.equal(ops.linear_8bit(x.view(1, M, 48).transpose(0, 1), *parts, None, 6.0)[:, 0], expected)


def test_autocast():
    parts, _ = weight_8bit(9, 48)
    x = activations("present").requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = ops.linear_8bit(x, *parts, torch.ones(9), 6.0)
    assert out.dtype == torch.bfloat16
    out.sum().backward()
    assert x.grad.dtype == torch.float32 and x.grad.isfinite().all()


def test_gradient_checkpointing():
    """bitsandbytes #1927: NaN under checkpointing."""
    parts, _ = weight_8bit(48, 48)

    def block(x):
        return ops.linear_8bit(torch.tanh(ops.linear_8bit(x, *parts, None, 6.0)), *parts, None, 6.0)

    x = activations("present").requires_grad_()
    plain = torch.autograd.grad(block(x).square().sum(), x)[0]
    checkpoint(block, x, use_reentrant=False).square().sum().backward()
    assert torch.equal(x.grad, plain) and plain.isfinite().all()


def test_recycled_buffers_are_noticed():
    for index in range(2):
        parts, _ = weight_8bit(9, 48)
        out = ops.linear_8bit(torch.randn(4, 48, requires_grad=True), *parts, None, 6.0)
        parts[index].fill_(3)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            out.sum().backward()


@pytest.mark.parametrize("asked", [True, False])
def test_either_way_can_be_forced(asked):
    parts, w = weight_8bit(9, 48)
    for m in (3, M):
        x = activations("present")[:m]
        out = ops.linear_8bit(x, *parts, None, 6.0, asked)
        absmax = parts[1].view(torch.float32)
        expected = llm_int8(x, parts[0], absmax, 6.0).double() if asked else x.double() @ w.double().T
        close(out, expected)


@pytest.mark.parametrize("outliers", [0, 6])
@pytest.mark.parametrize("dtype", DTYPES)
def test_no_less_accurate_than_bitsandbytes(dtype, outliers):
    """Relative error against the product with the weight before it was quantized, on the same inputs."""
    bnb = pytest.importorskip("bitsandbytes")
    weight = torch.randn(96, 512, dtype=torch.float16) * 0.05
    layer = bnb.nn.Linear8bitLt(512, 96, bias=False, has_fp16_weights=False, threshold=6.0)
    layer.weight = bnb.nn.Int8Params(weight.clone(), requires_grad=False, has_fp16_weights=False)
    layer = layer.to("cpu").eval()  # in training its CPU path leaves the activations alone
    parts = torch.ops.kbit.quantize_int8(weight)
    for m in (4, M, 300):
        x = torch.randn(m, 512).clamp(-4, 4)
        x[:, torch.randperm(512)[:outliers]] *= 20
        x = x.to(dtype)
        exact = x.double() @ weight.double().T
        theirs = (layer(x).double() - exact).norm()
        # Both round the activations to the same codes, but for those that bitsandbytes' cast to fp16 moves.
        assert (
            ops.linear_8bit(x, *parts, None, 6.0, None if m == 4 else True).double() - exact
        ).norm() <= 1.003 * theirs


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("m", [30, 520])
def test_too_many_outlier_columns_leave_int8(m, dtype):
    """Up to the limit the other columns are rounded to int8; beyond it nothing is."""
    parts, exact = weight_8bit(9, 400)
    limit = choose.llm_int8_outliers("cpu", m, 400)
    x = torch.randn(m, 400).clamp(-4, 4)
    for count in (limit, limit + 1):
        spread = x.clone()
        spread[m // 2, torch.randperm(400)[:count]] = 6.5
        spread = spread.to(dtype)
        out = reference.llm_int8(spread, parts[0], parts[1].view(torch.float32), 6.0).double()
        error = ((out - spread.double() @ exact.double().T).norm() / out.norm()).item()
        assert (1e-3 < error < 2e-2) if count == limit else error < 1e-5, (count, error)
